"""Any other tuner of PEFT, by its own name and keys.

`method_options` are `peft_type`, as PEFT's PeftType names it, and keys of that type's
config. A recipe's rank, alpha, dropout and targets fill in the keys of these meanings.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.errors import InputError, UnknownNameError
from memplan.fields import Kind
from memplan.methods import ADAPTER_KEYS, NO_OPTIONS, Method
from memplan.methods.lora import lora_keys, wrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from memplan.architecture import Linear
    from memplan.recipe import Recipe

SYNONYMS = {
    "r": ("r", "rank"),
    "lora_alpha": ("lora_alpha", "alpha"),
    "lora_dropout": ("lora_dropout", "{}_dropout", "module_dropout"),
}
"""What PEFT's configs call rank, alpha and dropout, by LoraConfig's names; {} is the
tuner's own name."""

RANK_IS_A_COUNT = {"OFT"}
"""Tuners whose `r` is a number of blocks, which a recipe's rank is not."""

FOUR_BITS = ("nf4", "fp4")

FAILS_ON = {
    "LOHA": FOUR_BITS,
    "LOKR": FOUR_BITS,
    "HRA": FOUR_BITS,
    "DELORA": (*FOUR_BITS, "int8"),
    "SHIRA": ("int8",),
}
"""Tuners that take a packed weight for a matrix, by the schemes' first words.

Run with PEFT 0.21.2 and bitsandbytes 0.50.2: forward and backward raise.
"""


class Peft(Method):
    """A tuner of PEFT that memplan has no file for."""

    summary: ClassVar[str] = "any other tuner of PEFT, by peft_type and its own keys"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = True

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        """As PEFT makes them for a single layer on the meta device; needs torch."""
        import torch
        from torch import nn

        from memplan.recipe import Recipe

        layer = nn.Linear(
            linear.in_features, linear.out_features, bias=linear.bias, device="meta"
        )
        recipe = Recipe(method="peft", rank=rank, method_options=dict(options))
        with torch.device("meta"):
            adapted = self.apply(nn.ModuleDict({"layer": layer}), recipe, ("layer",))
        return tuple(
            tuple(p.shape) for p in adapted.parameters() if p.requires_grad
        )

    def check_options(self, recipe: Recipe) -> None:
        peft_type = recipe.method_options.get("peft_type")
        if not isinstance(peft_type, str):
            raise InputError(
                "method_options.peft_type",
                peft_type,
                "names no tuner of PEFT",
                'give one as {"peft_type": "LOHA"}, say',
            )
        scheme = recipe.quantization.partition("-")[0]
        if scheme in FAILS_ON.get(peft_type, ()):
            raise InputError(
                "quantization",
                recipe.quantization,
                f"cannot carry {peft_type}, which takes packed weights for matrices",
                "use quantization none, or another method",
            )

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        try:
            return wrap(model, recipe, _config(recipe, targets))
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "method_options",
                dict(recipe.method_options),
                f"cannot be used: PEFT says: {' '.join(str(error).split())[:300]}",
                "see PEFT's documentation of that config",
            ) from error


def _config(recipe: Recipe, targets: tuple[str, ...]) -> Any:
    """PEFT's config with the recipe's keys; raises UnknownNameError for other keys."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    given = dict(recipe.method_options)
    peft_type = given.pop("peft_type")
    known = {kind.value: kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    if peft_type not in known:
        raise UnknownNameError("method_options.peft_type", peft_type, known)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[known[peft_type]]
    fields = {field.name for field in dataclasses.fields(config_class)}
    for key in given:
        if key not in fields:
            raise UnknownNameError("method_options", key, fields)
    return config_class(**_translated(recipe, targets, peft_type, fields) | given)


def _translated(
    recipe: Recipe, targets: tuple[str, ...], peft_type: str, fields: set[str]
) -> dict[str, Any]:
    """The recipe's keys under the names that the config has for them."""
    keys: dict[str, Any] = {}
    for key, value in lora_keys(recipe, targets).items():
        names = [n.format(peft_type.lower()) for n in SYNONYMS.get(key, (key,))]
        keys.update((name, value) for name in names if name in fields)
    if peft_type in RANK_IS_A_COUNT:
        del keys["r"]
    return keys


PART = Peft()
