"""A model ready to train: built, quantised, prepared, adapted, checkpointed.

Everything is done by the calls that a training script makes; only the weights' values
are missing where the model is built on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memplan import methods, quantizations
from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.inspector import build_config, build_meta_model
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.training.loss import prepare_loss

EAGER = "eager"
SDPA = "sdpa"


def build(architecture: Architecture, recipe: Recipe) -> nn.Module:
    """The model on the meta device, its linear layers stored as the recipe says."""
    source = ModelSource(
        name=architecture.name, origin="catalog", config=dict(architecture.config)
    )
    config = build_config(source)
    config.use_cache = False
    model = build_meta_model(
        architecture.name,
        config,
        dtype=getattr(torch, recipe.dtype),
        attn_implementation=EAGER if recipe.attention == EAGER else SDPA,
    )
    quantize(model, recipe)
    prepare_loss(model, recipe)
    return model.train()


def quantize(model: nn.Module, recipe: Recipe) -> None:
    """Puts the quantised module in the place of every linear layer but the head.

    As transformers.integrations.bitsandbytes.replace_with_bnb_linear does.
    """
    scheme = quantizations.find(recipe.quantization)
    if scheme.loading_flag is None:
        return
    for path, linear in list(_quantizable(model, recipe)):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, scheme.quantized(linear, recipe))
    model.requires_grad_(False)
    setattr(model, scheme.loading_flag, True)
    model.is_quantized = True  # type: ignore[assignment]


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Casts for k-bit training, and turns checkpointing on, as a script would."""
    import peft

    quantized = recipe.quantization != "none"
    checkpointed = recipe.checkpointing == "full"
    kwargs = {"use_reentrant": recipe.reentrant}
    if quantized and recipe.kbit_prepare and recipe.method != "full":
        peft.prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs=kwargs,
        )
    if checkpointed:
        _checkpoint(model, recipe, kwargs)
        if recipe.method != "full":
            model.enable_input_require_grads()  # type: ignore[operator]


def adapt(model: nn.Module, architecture: Architecture, recipe: Recipe) -> nn.Module:
    """The model with the recipe's method installed."""
    method = methods.find(recipe.method)
    adapted = method.apply(model, recipe, target_modules(architecture, recipe))
    if recipe.method != "full":
        _cast_adapters(adapted, recipe)
        _check_patterns(adapted, recipe)
    return adapted.train()


def target_modules(architecture: Architecture, recipe: Recipe) -> tuple[str, ...]:
    """The ends of the paths of the linear layers that are adapted.

    Raises InputError where a name matches no linear layer.
    """
    paths = [
        (linear.path, linear.kind)
        for block in architecture.blocks
        for linear in block.linears
    ]
    paths += [(linear.path, linear.kind) for linear in architecture.linears]
    if recipe.targets == "all-linear":
        return _ends(path for path, kind in paths if kind != "head")
    if isinstance(recipe.targets, str):
        return _ends(path for path, kind in paths if kind == recipe.targets)
    for name in recipe.targets:
        if not any(f".{path}".endswith(f".{name}") for path, _ in paths):
            _refuse_target(name, architecture)
    return tuple(recipe.targets)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer is given."""
    return [p for p in model.parameters() if p.requires_grad]


def _checkpoint(model: Any, recipe: Recipe, kwargs: dict[str, Any]) -> None:
    """Turns checkpointing on; transformers before 5.18 knows no n and no offload."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(
            activation_checkpointing_kwargs=kwargs,
            every_n_layers=recipe.every_n_layers,
            offload=recipe.offload,
        )
        return
    if recipe.every_n_layers > 1 or recipe.offload:
        field = "offload" if recipe.offload else "every_n_layers"
        raise InputError(
            field,
            getattr(recipe, field),
            "is not known to the installed transformers",
            "upgrade it, or leave the key out",
        )
    model.gradient_checkpointing_enable(kwargs)


def _quantizable(model: nn.Module, recipe: Recipe) -> Iterator[tuple[str, nn.Module]]:
    kept = set(recipe.unquantized_modules)
    head = model.get_output_embeddings()  # type: ignore[operator]
    for path, module in model.named_modules():
        is_head = module is head and "lm_head" in kept
        named = any(f".{path}.".find(f".{name}.") >= 0 for name in kept)
        if type(module) is nn.Linear and not (is_head or named):
            yield path, module


def _cast_adapters(model: nn.Module, recipe: Recipe) -> None:
    """Gives adapters the recipe's precision where PEFT's own casts do not.

    PEFT makes half-precision adapters single (`cast_adapter_dtype`) or leaves them in
    the base's precision; TRL casts those of a quantised model afterwards, magnitudes
    excepted (SFTTrainer.__init__).
    """
    dtype = getattr(torch, recipe.adapter_dtype)
    for name, parameter in model.named_parameters():
        kept = "lora_magnitude_vector" in name and recipe.trainer == "trl"
        if parameter.requires_grad and parameter.dtype != dtype and not kept:
            parameter.data = parameter.data.to(dtype)
    if not recipe.input_casts:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False


def _check_patterns(model: nn.Module, recipe: Recipe) -> None:
    """Raises InputError for a pattern that matches no adapted module."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    paths = [
        path.removeprefix("base_model.model.")
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(recipe, field):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths):
                raise InputError(
                    field, key, "matches no adapted module", "see `memplan inspect`"
                )


def _refuse_target(name: str, architecture: Architecture) -> None:
    from memplan.errors import UnknownNameError

    known: dict[str, Any] = dict.fromkeys(
        linear.path.rpartition(".")[2] for _, linear in architecture.all_linears()
    )
    raise UnknownNameError("targets", name, known, "see `memplan inspect`")


def _ends(paths: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
