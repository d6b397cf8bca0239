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

ANY = ("none", "int8", "nf4", "fp4")

TUNERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("BEFT", "BOFT", "FOURIERFT", "GRALORA", "HIRA", "IA3", "LILY"), ANY
    ),
    **dict.fromkeys(("LORA", "MISS", "OFT", "PROMPT_TUNING", "PVERA"), ANY),
    **dict.fromkeys(("P_TUNING", "RANDLORA", "ROAD", "WAVEFT"), ANY),
    **dict.fromkeys(("DEFT", "HRA", "LOHA", "LOKR", "PEANUT"), ("none", "int8")),
    "C3A": ("none", "nf4", "fp4"),
    **dict.fromkeys(("DELORA", "GLORA", "SUPERTUNING"), ("none",)),
}
"""Tuners that train, and the schemes (by their first word) that they train on.

Run with PEFT 0.21.2 and bitsandbytes 0.50.2; on others forward or backward raises: C3A
adds in place to what int8 layers return as a view on a card.
"""

_ALL_OF_LORA = frozenset(
    {"rank", "alpha", "dropout", "targets", "rank_pattern", "alpha_pattern"}
)

READ_KEYS: Mapping[str, frozenset[str]] = {
    "LORA": _ALL_OF_LORA,
    **dict.fromkeys(("LOHA", "LOKR"), _ALL_OF_LORA),
    **dict.fromkeys(("HIRA", "DELORA"), _ALL_OF_LORA - {"alpha", "alpha_pattern"}),
    **dict.fromkeys(
        ("GRALORA", "DEFT", "SUPERTUNING"),
        frozenset({"rank", "alpha", "dropout", "targets"}),
    ),
    **dict.fromkeys(
        ("MISS", "PVERA", "RANDLORA"), frozenset({"rank", "dropout", "targets"})
    ),
    **dict.fromkeys(("GLORA", "HRA", "LILY", "PEANUT"), frozenset({"rank", "targets"})),
    **dict.fromkeys(("BOFT", "OFT"), frozenset({"dropout", "targets"})),
    **dict.fromkeys(
        ("BEFT", "C3A", "FOURIERFT", "IA3", "ROAD", "WAVEFT"), frozenset({"targets"})
    ),
    **dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), frozenset()),
}
"""Which of a recipe's keys have a place in a tuner's config."""

_OF_ALL = frozenset({"trained_modules", "adapter_dtype", "input_casts"})

OWN_METHODS = {"ADALORA": "adalora", "VERA": "vera"}

FOREIGN_SCRATCH = {"BOFT": "cuSOLVER", "C3A": "cuFFT", "FOURIERFT": "cuFFT"}
"""Tuners that call libraries whose workspace is not public."""


class Peft(Method):
    """A tuner of PEFT that memplan has no file for."""

    summary: ClassVar[str] = "any other tuner of PEFT, by peft_type and its own keys"
    uses: ClassVar[frozenset[str]] = ADAPTER_KEYS
    options: ClassVar[Mapping[str, Kind]] = {}
    carries_quantized: ClassVar[bool] = True

    def reads(self, recipe: Recipe) -> frozenset[str]:
        peft_type = recipe.method_options.get("peft_type", "")
        return _OF_ALL | READ_KEYS.get(peft_type, frozenset())

    def parameter_shapes(
        self, linear: Linear, rank: int, options: Mapping[str, Any] = NO_OPTIONS
    ) -> tuple[tuple[int, ...], ...]:
        """As PEFT makes them for a single layer on the meta device; needs torch."""
        import peft
        import torch
        from torch import nn

        from memplan.recipe import Recipe

        layer = nn.Linear(
            linear.in_features, linear.out_features, bias=linear.bias, device="meta"
        )
        # Keys such as IA3's feedforward_modules tell layers by their names.
        name = linear.path.rpartition(".")[2] or "layer"
        recipe = Recipe(method="peft", rank=rank, method_options=dict(options))
        config = _config(recipe, (name,))
        config.task_type = None
        try:
            with torch.device("meta"):
                adapted = peft.get_peft_model(nn.ModuleDict({name: layer}), config)
        except (RuntimeError, TypeError, ValueError) as error:
            raise _refused(recipe, error) from error
        return tuple(tuple(p.shape) for p in adapted.parameters() if p.requires_grad)

    def check_options(self, recipe: Recipe) -> None:
        peft_type = recipe.method_options.get("peft_type")
        if peft_type in OWN_METHODS:
            raise InputError(
                "method_options.peft_type",
                peft_type,
                "is a method of its own",
                f"use method {OWN_METHODS[peft_type]}",
            )
        if not isinstance(peft_type, str) or peft_type not in TUNERS:
            raise UnknownNameError(
                "method_options.peft_type",
                peft_type,
                TUNERS,
                f"these train and are simulated: {', '.join(sorted(TUNERS))}",
            )
        if recipe.quantization.partition("-")[0] not in TUNERS[peft_type]:
            raise InputError(
                "quantization",
                recipe.quantization,
                f"cannot carry {peft_type}, which takes packed weights for matrices",
                f"use one of: {', '.join(TUNERS[peft_type])}",
            )

    def notes(self, recipe: Recipe) -> tuple[str, ...]:
        peft_type = recipe.method_options["peft_type"]
        if peft_type not in FOREIGN_SCRATCH:
            return ()
        library = FOREIGN_SCRATCH[peft_type]
        return (f"The workspace of {library}, which {peft_type} calls, is not known.",)

    def apply(
        self, model: nn.Module, recipe: Recipe, targets: tuple[str, ...]
    ) -> nn.Module:
        config = _config(recipe, targets)
        try:
            adapted = wrap(model, recipe, config)
        except (TypeError, ValueError, AttributeError) as error:
            raise _refused(recipe, error) from error
        _check_flags(adapted, config)
        return adapted


def _config(recipe: Recipe, targets: tuple[str, ...]) -> Any:
    """PEFT's config with the recipe's keys; raises UnknownNameError for other keys."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    given = dict(recipe.method_options)
    peft_type = given.pop("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    fields = {field.name for field in dataclasses.fields(config_class)}
    for key in given:
        if key not in fields:
            raise UnknownNameError("method_options", key, fields)
    try:
        return config_class(**_translated(recipe, targets, peft_type, fields) | given)
    except (TypeError, ValueError) as error:
        raise _refused(recipe, error) from error


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


def _check_flags(adapted: nn.Module, config: Any) -> None:
    """Raises InputError for a variant of LoRA that PEFT passes over in silence.

    bitsandbytes' layers know DoRA, aLoRA and Arrow alone (tuners.lora.bnb), and
    `use_qalora` is read by GPTQ's alone (tuners.lora.gptq).
    """
    from peft.tuners.lora import LoraLayer

    asked = [
        field.name
        for field in dataclasses.fields(config)
        if (field.metadata.get("is_lora_variant") or field.name == "use_qalora")
        and getattr(config, field.name)
    ]
    ignored = any(
        isinstance(module, LoraLayer) and not module.lora_variant
        for module in adapted.modules()
    )
    if asked and ignored:
        raise InputError(
            f"method_options.{asked[0]}",
            getattr(config, asked[0]),
            "is ignored by PEFT on these layers, which become plain LoRA",
            "use another quantisation, or memplan's own method of that name",
        )


def _refused(recipe: Recipe, error: Exception) -> InputError:
    return InputError(
        "method_options",
        dict(recipe.method_options),
        f"cannot be used: PEFT says: {' '.join(str(error).split())[:300]}",
        "see PEFT's documentation of that config",
    )


PART = Peft()
