"""What losses have in common that are Triton kernels: where they run, and for what."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from memplan.errors import InputError
from memplan.losses._head import check_head, scaling_of


def check_fused(model: Any, loss: str) -> None:
    """Raises InputError for a head that the kernels do not compute."""
    head = check_head(model, loss)
    if head.bias is not None or scaling_of(model.config).factor != 1.0:
        raise InputError(
            "loss",
            loss,
            "computes a head without bias, whose logits are not scaled, unlike "
            f"{type(model).__name__}'s",
            "use loss chunked-nll",
        )


def is_simulated(hidden_states: Tensor, loss: str) -> bool:
    """Whether tensors are meta ones; raises InputError where kernels cannot run."""
    device = hidden_states.device.type
    if device not in ("meta", "cuda"):
        raise InputError(
            "loss",
            loss,
            f"is a Triton kernel for CUDA cards, and cannot run on {device}",
            "simulate it, or use loss chunked-nll here",
        )
    return device == "meta"


def missing(loss: str, package: str) -> InputError:
    """The error where the package that holds the kernels is not installed."""
    return InputError(
        "loss",
        loss,
        f"needs {package}",
        f"install it with: pip install {package}; or use loss chunked-nll",
    )
