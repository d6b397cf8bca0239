"""A model whose forward ends before its head, which the loss computes for itself."""

# transformers is untyped to the checker.
# mypy: allow-subclassing-any

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from memplan.errors import InputError

IGNORED = -100
"""The label of tokens that are not scored (torch's `ignore_index`)."""

_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""The names under which configurations keep what logits are multiplied by."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """What a model does to its logits: softcap * tanh(factor * logits / softcap)."""

    factor: float = 1.0
    softcap: float | None = None

    def apply(self, logits: Tensor) -> Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """The head as a layer, and what is done to its logits."""

    layer: Any
    scaling: Scaling

    @property
    def weight(self) -> Tensor:
        """(V, H)."""
        weight: Tensor = self.layer.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layer.bias
        return bias


@dataclass
class LossOutput(ModelOutput):
    """The loss, and the metrics of ways that compute some."""

    loss: Tensor | None = None
    num_correct: Tensor | None = None
    entropy_sum: Tensor | None = None


Compute = Callable[[Tensor, Head, Tensor], LossOutput]
"""From hidden states (B, T, H), the head and labels (B, T) to the loss."""


def replace_forward(
    model: Any,
    loss: str,
    compute: Compute,
    *,
    plain: bool = True,
    in_evaluation: bool = True,
) -> None:
    """Lets a model with labels run its body, then `compute`; without them, as before.

    `plain` says whether the head must be a plain linear layer, and `in_evaluation`
    whether the loss is computed so outside of training too; a caller may say otherwise
    by `skip_logits`, as Trainer does where it evaluates for the loss alone.
    """
    check_head(model, loss, plain=plain)
    scaling = scaling_of(model.config)
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        labels: Tensor | None = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if skip_logits is None:
            skip_logits = self.training or in_evaluation
        if labels is None or not skip_logits:
            return original(*args, labels=labels, **kwargs)
        outputs = self.base_model(*args, **kwargs | {"use_cache": False})
        head = Head(layer=check_head(self, loss, plain=plain), scaling=scaling)
        return compute(outputs.last_hidden_state, head, labels)

    model.forward = types.MethodType(forward, model)


def check_head(model: Any, loss: str, *, plain: bool = True) -> Any:
    """The model's head; raises InputError where it is not `plain` but has to be.

    What reads the weight of a linear head would drop what else the head does: an
    adapter beside it, a normalisation, a quantised weight. One that is trained whole is
    plain.
    """
    head = model.get_output_embeddings()
    linear = type(getattr(head, "original_module", head)) is nn.Linear
    if (plain and not linear) or head is None or model.base_model is model:
        raise InputError(
            "loss",
            loss,
            f"reads the weight of a plain linear head, which {_named(model, head)} "
            "does not have",
            "use loss full, and leave the head unquantised and without adapter",
        )
    return head


def scaling_of(config: Any) -> Scaling:
    """What a model of that configuration does to its logits."""
    config = config.get_text_config()
    factor = next(
        (
            float(value)
            for name in _FACTORS
            if (value := getattr(config, name, None)) is not None
        ),
        1.0,
    )
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        factor = divisor if config.model_type == "hyperclovax" else 1 / divisor
    if getattr(config, "dim_model_base", None):
        # MiniCPM divides the hidden states, which comes to the same.
        factor = config.dim_model_base / config.hidden_size
    return Scaling(
        factor=factor, softcap=getattr(config, "final_logit_softcapping", None)
    )


def _named(model: Any, head: Any) -> str:
    return f"{type(model).__name__} (its head is a {type(head).__name__})"
