"""A model ready to train: built, quantised, prepared, adapted, checkpointed.

Everything is done by the calls that a training script makes; only the weights' values
are missing where the model is built on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from memplan import methods, quantizations
from memplan.architecture import Architecture, Linear
from memplan.errors import InputError, UnknownNameError
from memplan.inspector import build_config, build_meta_model
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.training.few_layers import KeptLayers, build_few, whole_modules
from memplan.training.loss import prepare_loss

EAGER = "eager"
SDPA = "sdpa"

_FUSED_ROUTER = "gate.weight"
"""PEFT's name of the router's weight where it stands for a linear layer."""


def build(
    architecture: Architecture, recipe: Recipe, kept: KeptLayers | None = None
) -> nn.Module:
    """The model on the meta device, its linear layers stored as the recipe says.

    Of one stack only those layers are built that are kept, if this is said.
    """
    source = ModelSource(
        name=architecture.name, origin="catalog", config=dict(architecture.config)
    )
    config = build_config(source)
    # A model with towers reads its decoder's own part of the configuration.
    config.use_cache = config.get_text_config().use_cache = False
    dtype = getattr(torch, recipe.dtype)
    attention = _attention(architecture, recipe)

    def build_whole() -> nn.Module:
        model: nn.Module = build_meta_model(
            architecture.name, config, dtype=dtype, **attention
        )
        return model

    model = build_few(build_whole, architecture, kept) if kept else build_whole()
    _keep_in_float32(model, dtype)
    quantize(model, recipe)
    prepare_loss(model, recipe)
    return model.train()


def load(
    architecture: Architecture, recipe: Recipe, checkpoint: str, device: torch.device
) -> nn.Module:
    """The model of a checkpoint on a device, as `from_pretrained` loads it there.

    Raises InputError where the checkpoint cannot be loaded.
    """
    if Path(checkpoint).is_file():
        raise _unloadable(checkpoint, "is a file, and weights lie in a folder")
    _check_loadable(recipe)
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=getattr(torch, recipe.dtype),
            device_map={"": device},
            quantization_config=_quantization_config(recipe),
            **_attention(architecture, recipe),
        )
    except (OSError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        problem = f"cannot be loaded ({first_line})"
        raise _unloadable(checkpoint, problem) from error
    model.config.use_cache = False  # type: ignore[union-attr]
    return model


def _check_loadable(recipe: Recipe) -> None:
    """Raises InputError for a scheme that from_pretrained quantises no weights to."""
    if quantizations.find(recipe.quantization).loads_checkpoints:
        return
    raise InputError(
        "quantization",
        recipe.quantization,
        "is nothing that transformers loads a checkpoint to",
        "leave out --weights, or use one of: nf4-double, int8, quanto-int8",
    )


def _unloadable(checkpoint: str, problem: str) -> InputError:
    remedy = "give a folder or hub id with weights, or leave the option out"
    return InputError("--weights", checkpoint, problem, remedy)


def declare_quantized(model: Any, recipe: Recipe) -> None:
    """Says of a model that `build` gave what `from_pretrained` says of a loaded one.

    Trainer asks a quantised model's quantiser whether it may be trained.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    config = _quantization_config(recipe)
    if config is not None:
        model.hf_quantizer = AutoHfQuantizer.from_config(config)


def quantize(model: nn.Module, recipe: Recipe) -> None:
    """Puts the quantised module in the place of every linear layer but the head.

    As transformers.integrations.bitsandbytes.replace_with_bnb_linear does.
    """
    scheme = quantizations.find(recipe.quantization)
    if scheme.loading_flag is None:
        return
    for path, linear in list(_quantizable(model, recipe)):
        quantized = scheme.quantized(linear, recipe)
        quantized.source_cls = type(linear)  # type: ignore[assignment]
        quantized.merge_problem = scheme.merge_problem  # type: ignore[assignment]
        model.set_submodule(path, quantized)
    setattr(model, scheme.loading_flag, True)
    model.is_quantized = True  # type: ignore[assignment]


def prepare(model: nn.Module, recipe: Recipe) -> None:
    """Casts for k-bit training, and turns checkpointing on, as a script would."""
    import peft

    quantized = recipe.quantization != "none"
    checkpointed = recipe.checkpointing == "full"
    kwargs = {"use_reentrant": recipe.reentrant}
    prepares = quantizations.find(recipe.quantization).kbit_prepares
    if quantized and prepares and recipe.kbit_prepare and recipe.method != "full":
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
    targets = target_modules(architecture, recipe)
    fused = dict(_fused_linears(architecture))
    if isinstance(recipe.targets, str):
        targets = _wrappable(model, targets, fused)
    if recipe.method != "full":
        _check_fused(recipe, targets, fused)
        _check_trained_modules(model, recipe)
    adapted = install(model, recipe, targets)
    if recipe.method != "full":
        _check_patterns(adapted, recipe)
        _check_trained(adapted, recipe)
    return adapted.train()


def install(model: nn.Module, recipe: Recipe, targets: tuple[str, ...]) -> nn.Module:
    """The model with the method on the modules of those paths, in its precision."""
    adapted = methods.find(recipe.method).apply(model, recipe, targets)
    if recipe.method != "full":
        _cast_adapters(adapted, recipe)
    return adapted


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
    fused = _fused_linears(architecture)
    paths += fused
    if recipe.targets == "all-linear":
        return _ends(path for path, kind in paths if kind != "head")
    if isinstance(recipe.targets, str):
        return _ends(path for path, kind in paths if kind == recipe.targets)
    known = [path for path, _ in (*architecture.all_linears(), *fused)]
    for name in recipe.targets:
        if not any(f".{path}".endswith(f".{name}") for path in known):
            _refuse_target(name, architecture)
    return tuple(recipe.targets)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer is given."""
    return [p for p in model.parameters() if p.requires_grad]


def _checkpoint(model: Any, recipe: Recipe, kwargs: dict[str, Any]) -> None:
    """Turns checkpointing on; transformers before 5.18 knows no n and no offload.

    On a CPU nothing is to be copied off a card, and no memory can be pinned.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(
            activation_checkpointing_kwargs=kwargs,
            every_n_layers=recipe.every_n_layers,
            offload=recipe.offload and model.device.type != "cpu",
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


def _quantization_config(recipe: Recipe) -> Any:
    """What tells from_pretrained to quantise as the recipe does; None where not.

    `lm_head` stands for whatever transformers itself leaves unquantised.
    """
    scheme = quantizations.find(recipe.quantization)
    skipped = [name for name in recipe.unquantized_modules if name != "lm_head"]
    named = {"llm_int8_skip_modules": [*skipped, "lm_head"]} if skipped else {}
    if scheme.loading_flag == "is_loaded_in_8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **named)
    if scheme.loading_flag == "is_loaded_in_4bit":
        kind, _, double = recipe.quantization.partition("-")
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=bool(double),
            bnb_4bit_compute_dtype=getattr(torch, recipe.compute_dtype),
            **named,
        )
    if scheme.loading_flag == "quanto_quantized":
        return transformers.QuantoConfig(
            weights=f"int{scheme.bits}",
            modules_to_not_convert=[*skipped, "lm_head"] if skipped else None,
        )
    return None


def _attention(architecture: Architecture, recipe: Recipe) -> dict[str, Any]:
    """The argument that asks for an attention; none where the model's own is taken.

    That is SDPA, or eager where the class has no SDPA or the configuration says so.
    """
    if recipe.attention == "auto":
        return {}
    if recipe.attention == EAGER:
        return {"attn_implementation": EAGER}
    model_class = getattr(transformers, architecture.class_name, None)
    if model_class is not None and not model_class._supports_sdpa:
        raise InputError(
            "attention",
            recipe.attention,
            f"cannot run: {architecture.class_name} has eager attention alone",
            "use attention auto or eager",
        )
    return {"attn_implementation": SDPA}


def _keep_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts what the family keeps in single precision, as from_pretrained loads it."""
    patterns = "|".join(model._get_dtype_plan(dtype))  # type: ignore[operator]
    if not patterns:
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if re.search(patterns, name):
            tensor.data = tensor.data.to(torch.float32)


def _fused_linears(architecture: Architecture) -> list[tuple[str, str]]:
    """Names and kinds of linear layers that are a part of fused experts.

    PEFT still takes these names, and adapts the stacked parameters in their place
    (peft.utils.transformers_weight_conversion, PEFT >= 0.19).
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return []
    family = conversion._MODEL_TO_CONVERSION_PATTERN.get(architecture.model_type)
    names = conversion._MOE_TARGET_MODULE_MAPPING.get(family, {})
    return [
        (name, "router" if fused == _FUSED_ROUTER else "mlp")
        for name, fused in names.items()
    ]


def _check_fused(
    recipe: Recipe, targets: tuple[str, ...], fused: Mapping[str, str]
) -> None:
    """Raises InputError for what PEFT cannot do to stacked parameters.

    Source: peft.tuners.lora.layer.ParamWrapper.
    """
    if not any(
        f".{target}".endswith(f".{name}") for target in targets for name in fused
    ):
        return
    problem = "cannot be used on fused experts: PEFT adapts them by parameter"
    remedy = "use targets attention, or name the layers"
    if recipe.dropout > 0:
        raise InputError("dropout", recipe.dropout, problem, f"use 0, or {remedy}")
    if recipe.method == "dora":
        raise InputError("method", recipe.method, problem, f"use lora, or {remedy}")


def _wrappable(
    model: nn.Module, targets: tuple[str, ...], fused: Container[str]
) -> tuple[str, ...]:
    """The targets without what PEFT cannot wrap.

    A router that is a linear layer but returns several tensors is left out (Llama 4).
    An end that is also that of another kind of module is replaced by whole paths
    (Gemma 4: its vision tower wraps linear layers under the names of the decoder's).
    """
    modules = dict(model.named_modules())
    kept: list[str] = []
    for target in targets:
        paths = [path for path in modules if f".{path}".endswith(f".{target}")]
        linears = [path for path in paths if _is_plain_linear(modules[path])]
        whole = target in fused or len(linears) == len(paths)
        kept += [target] if whole else linears
    return tuple(kept)


def _is_plain_linear(module: nn.Module) -> bool:
    # What quantisation puts in a linear layer's place need not be one to PyTorch.
    linear = isinstance(module, nn.Linear | Conv1D) or hasattr(module, "source_cls")
    return linear and "router" not in type(module).__name__.lower()


def _quantizable(model: Any, recipe: Recipe) -> Iterator[tuple[str, nn.Module]]:
    """The layers that transformers' quantiser would take, with their paths.

    It skips what `llm_int8_skip_modules` names; the head, and what is tied to it, where
    nothing is named (transformers.quantizers.base, `get_modules_to_not_convert`).
    """
    skipped = [*recipe.unquantized_modules, *(model._keep_in_fp32_modules or ())]
    if "lm_head" in recipe.unquantized_modules:
        skipped += get_keys_to_not_convert(model)
    for path, module in model.named_modules():
        taken = type(module) is nn.Linear or isinstance(module, Conv1D)
        if taken and should_convert_module(path, skipped):
            yield path, module


def _cast_adapters(model: nn.Module, recipe: Recipe) -> None:
    """Gives adapters the recipe's precision where PEFT's own casts do not.

    PEFT makes half-precision adapters single (`cast_adapter_dtype`) or leaves them in
    the base's precision, in which modules that are trained whole stay. TRL casts all
    that is trained beside a quantised model, magnitudes excepted (SFTTrainer.__init__).
    """
    dtype = getattr(torch, recipe.adapter_dtype)
    by_trl = recipe.trainer == "trl" and recipe.quantization != "none"
    kept = "lora_magnitude_vector" if by_trl else ".modules_to_save."
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != dtype and kept not in name:
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
        for path, module in whole_modules(model)
        if isinstance(module, BaseTunerLayer)
    ]
    patterns = {"rank_pattern", "alpha_pattern", "lambda_pattern"}
    for field in sorted(patterns & methods.find(recipe.method).reads(recipe)):
        for key in getattr(recipe, field):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths):
                raise InputError(
                    field, key, "matches no adapted module", "see `memplan inspect`"
                )


def _check_trained(model: nn.Module, recipe: Recipe) -> None:
    """Raises InputError where a layer trains other numbers than its method means to.

    What makes a difference is PEFT's: a rank that becomes trained, a factor that a
    switch thaws, a flag that a layer does not know.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    method = methods.find(recipe.method)
    if recipe.method == "peft":
        return
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or hasattr(module, "parameter_name"):
            continue
        path = name.removeprefix("base_model.model.")
        linear = Linear(
            path=path,
            in_features=module.in_features,
            out_features=module.out_features,
            bias=False,
            kind="other",
        )
        options = methods.options_at(recipe, path)
        rank = methods.rank_at(recipe, path)
        meant = method.trainable_parameters(linear, rank, options)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        if trained != meant:
            raise InputError(
                "method",
                recipe.method,
                f"trains {trained} numbers in {path}, where it means {meant}: the "
                "installed PEFT installs it otherwise",
                "install the versions of constraints.txt",
            )


def _check_trained_modules(model: nn.Module, recipe: Recipe) -> None:
    """Raises InputError for a name that no module ends with, or a quantised one's.

    PEFT passes over the first (`set_additional_trainable_modules`).
    """
    modules = {path: module for path, module in whole_modules(model) if path}
    for name in recipe.trained_modules:
        named = [module for path, module in modules.items() if path.endswith(name)]
        if not named:
            known = dict.fromkeys(path.rpartition(".")[2] for path in modules)
            raise UnknownNameError("trained_modules", name, known)
        inner = [part for module in named for part in module.modules()]
        if any(hasattr(part, "source_cls") for part in inner):
            raise InputError(
                "trained_modules",
                name,
                "is quantised, and quantised weights cannot be trained",
                "name it in unquantized_modules, too",
            )


def _refuse_target(name: str, architecture: Architecture) -> None:
    known: dict[str, Any] = dict.fromkeys(
        linear.path.rpartition(".")[2] for _, linear in architecture.all_linears()
    )
    raise UnknownNameError("targets", name, known, "see `memplan inspect`")


def _ends(paths: Iterator[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
