"""Methods of memplan's own as variants of PEFT's LoRA, which saves and loads them.

PEFT takes new layers by `LoraConfig._register_custom_module` (peft 0.21,
tuners.lora.model, `_create_new_module`); a layer takes what it computes from a
`LoraVariant`. The config that a checkpoint holds names the method and its options.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import peft
from peft.import_utils import is_hqq_available
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from transformers.pytorch_utils import Conv1D

from memplan.methods import matching
from memplan.methods.lora import lora_keys, wrap

if TYPE_CHECKING:
    from memplan.recipe import Recipe

VariantOf = Callable[[Mapping[str, Any]], Any]
"""Makes the LoraVariant of a layer with these options."""

LOSSY = "would be rounded again: the base is quantised and has no place for it"


@dataclasses.dataclass
class VariantConfig(peft.LoraConfig):  # type: ignore[misc]
    """LoRA's config with the options of one of memplan's methods."""

    memplan_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    memplan_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    """What `memplan_patterned` is for layers that a key matches, PEFT's syntax."""
    memplan_patterned: str | None = None

    def options_of(self, path: str) -> dict[str, Any]:
        """The options of the layer of a path."""
        found = matching(self.memplan_pattern, path)
        if self.memplan_patterned is None or found is None:
            return self.memplan_options
        return self.memplan_options | {self.memplan_patterned: found}


class _Varied:
    """A LoRA layer whose variant is the method's, whatever the config's flags say."""

    variant_of: VariantOf
    """Set by `_layer_class`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # PEFT's constructors resolve the variant, for which the path must be known.
        self._path: str = kwargs["target_name"]
        super().__init__(*args, **kwargs)

    def resolve_lora_variant(self, *, config: VariantConfig, **kwargs: Any) -> Any:
        return type(self).variant_of(config.options_of(self._path))


def apply_variant(  # noqa: PLR0913 - a variant, and where it goes
    model: nn.Module,
    recipe: Recipe,
    targets: tuple[str, ...],
    variant_of: VariantOf,
    options: Mapping[str, Any],
    patterned: str | None = None,
) -> nn.Module:
    """The model with variants of LoRA on the modules of those paths."""
    config = VariantConfig(
        **lora_keys(recipe, targets),
        memplan_options=dict(options),
        memplan_pattern=dict(recipe.lambda_pattern) if patterned else {},
        memplan_patterned=patterned,
    )
    _register(config, variant_of)
    return wrap(model, recipe, config)


def load_variant(model: nn.Module, folder: str, variant_of: VariantOf) -> nn.Module:
    """The model with variants that were saved in a folder."""
    text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
    known = {field.name for field in dataclasses.fields(VariantConfig)}
    keys = {key: value for key, value in json.loads(text).items() if key in known}
    config = VariantConfig(**keys)
    _register(config, variant_of)
    loaded: nn.Module = peft.PeftModel.from_pretrained(model, folder, config=config)
    return loaded


def _register(config: VariantConfig, variant_of: VariantOf) -> None:
    """Says which layers stand for which; bitsandbytes' are linear layers, too."""
    four = _layer_class(Linear4bit, variant_of)
    eight = _layer_class(Linear8bitLt, variant_of)
    plain = _layer_class(lora_layer.Linear, variant_of)

    def four_bits(target: Any, *args: Any, **kwargs: Any) -> Any:
        weight = target.weight
        return four(
            target,
            *args,
            compute_dtype=target.compute_dtype,
            compress_statistics=weight.compress_statistics,
            quant_type=weight.quant_type,
            **kwargs,
        )

    def eight_bits(target: Any, *args: Any, **kwargs: Any) -> Any:
        state = target.state
        return eight(
            target,
            *args,
            has_fp16_weights=state.has_fp16_weights,
            threshold=state.threshold,
            index=target.index,
            **kwargs,
        )

    def transposed(target: Any, adapter: str, config: Any, **kwargs: Any) -> Any:
        config.fan_in_fan_out = True
        return plain(
            target, adapter, config=config, is_target_conv_1d_layer=True, **kwargs
        )

    config._register_custom_module(
        {
            bnb.nn.Linear4bit: four_bits,
            bnb.nn.Linear8bitLt: eight_bits,
            nn.Linear: plain,
            Conv1D: transposed,
            **_hqq_layers(variant_of),
        }
    )


def _hqq_layers(variant_of: VariantOf) -> dict[type, type]:
    """HQQ's layer and what stands for it, where HQQ is installed."""
    if not is_hqq_available():
        return {}
    from hqq.core.quantize import HQQLinear
    from peft.tuners.lora.hqq import HqqLoraLinear

    return {HQQLinear: _layer_class(HqqLoraLinear, variant_of)}


def _layer_class(base: type, variant_of: VariantOf) -> type:
    """A class of PEFT's layers with the method's variant."""
    return type(
        base.__name__, (_Varied, base), {"variant_of": staticmethod(variant_of)}
    )


class Variant(lora_layer.LoraVariant):  # type: ignore[misc]
    """A variant that adds a linear function of x, and so merges into dense weights.

    Leaves say what they compute (`forward`) and the weight that equals it (`delta`).
    """

    def delta(self, module: Any, adapter: str) -> Any:
        """The weight (o, i) that computes what the adapter does."""
        raise NotImplementedError("this adapter is no linear function of its input")

    def merge_safe(self, module: Any, adapter: str, orig_weight: Any) -> Any:
        return orig_weight + self._delta_of(module, adapter, orig_weight)

    def merge_unsafe(self, module: Any, adapter: str, orig_weight: Any) -> None:
        orig_weight.data += self._delta_of(module, adapter, orig_weight)

    def unmerge(self, module: Any, adapter: str, orig_weight: Any) -> Any:
        return orig_weight - self._delta_of(module, adapter, orig_weight)

    def _delta_of(self, module: Any, adapter: str, weight: Any) -> Any:
        base = module.get_base_layer()
        stored = getattr(base, "weight", None)
        if stored is None or not stored.is_floating_point():
            raise NotImplementedError(f"what the adapter adds {LOSSY}")
        delta = self.delta(module, adapter)
        return (delta.T if isinstance(base, Conv1D) else delta).to(weight.dtype)
