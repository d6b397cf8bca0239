"""What can be said of a recipe for a model on a card before anything is computed.

Raises InputError for what cannot run; returns notes on what runs otherwise than a
person may think.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan import losses, methods, quantizations
from memplan.architecture import Architecture
from memplan.errors import InputError, UnknownNameError
from memplan.gpu import Gpu
from memplan.recipe import Recipe

SMALLEST_INT8_CAPABILITY = (7, 5)
"""Turing: LLM.int8() multiplies on its tensor cores."""


def check(
    architecture: Architecture, recipe: Recipe, gpu: Gpu | None = None
) -> tuple[str, ...]:
    """Notes on the recipe; raises InputError where it cannot run."""
    _check_model(architecture)
    _check_positions(architecture, recipe)
    _check_card(recipe, gpu)
    method_notes = methods.check(recipe)
    methods.check_shapes(architecture, recipe)
    if recipe.method != "full":
        _check_names(architecture, recipe)
    _check_base(recipe)
    scheme = quantizations.find(recipe.quantization)
    scheme.check(recipe, gpu)
    _check_optimizer(recipe)
    return (
        *method_notes,
        *architecture.notes,
        *_position_notes(architecture, recipe),
        *_recipe_notes(recipe),
        *scheme.notes(recipe),
        *losses.find(recipe.loss).notes(gpu),
        *_card_notes(recipe, gpu),
    )


def check_inference(
    architecture: Architecture, recipe: Recipe, gpu: Gpu | None, *, adapted: bool
) -> tuple[str, ...]:
    """Notes on inference with what the recipe tunes; errors likewise.

    Of a model without adapters nothing but its own layers matters.
    """
    if adapted:
        return check(architecture, recipe, gpu)
    _check_model(architecture)
    _check_positions(architecture, recipe)
    _check_card(recipe, gpu)
    return (
        *architecture.notes,
        *_position_notes(architecture, recipe),
        *_card_notes(recipe, gpu),
    )


def _check_model(architecture: Architecture) -> None:
    if not architecture.generative:
        raise InputError(
            "model",
            architecture.name,
            f"is a {architecture.class_name}, which can be inspected only",
            "give a causal language model",
        )


def _check_positions(architecture: Architecture, recipe: Recipe) -> None:
    longest = architecture.max_positions
    if not architecture.learned_positions or longest is None:
        return
    if recipe.sequence_length > longest:
        raise InputError(
            "sequence_length",
            recipe.sequence_length,
            f"is longer than the {longest} positions that {architecture.name} learned",
            f"give at most {longest}",
        )


def _check_optimizer(recipe: Recipe) -> None:
    if recipe.optimizer == "lora-fa" and recipe.method != "lora-fa":
        raise InputError(
            "optimizer",
            recipe.optimizer,
            f"is of method lora-fa alone, and would freeze A under {recipe.method}",
            "use method lora-fa, or another optimizer",
        )


TIED_HEAD = "lm_head"
"""What transformers calls a head that is the embedding, and no layer here."""


def _check_names(architecture: Architecture, recipe: Recipe) -> None:
    """Raises InputError for names and patterns that nothing of the model answers to.

    PEFT takes further names for stacked experts: for them it is left to what is built.
    """
    if not architecture.num_experts:
        _check_targets(architecture, recipe)
        _check_patterns(architecture, recipe)
    _check_trained_modules(architecture, recipe)


def _check_targets(architecture: Architecture, recipe: Recipe) -> None:
    if isinstance(recipe.targets, str):
        return
    paths = [f".{path}" for path, _ in architecture.all_linears()]
    for name in recipe.targets:
        if not any(path.endswith(f".{name}") for path in paths):
            known = dict.fromkeys(path.rpartition(".")[2] for path in paths)
            raise UnknownNameError("targets", name, known, "see `memplan inspect`")


def _check_patterns(architecture: Architecture, recipe: Recipe) -> None:
    fields = {"rank_pattern", "alpha_pattern", "lambda_pattern"}
    given = [
        (field, key)
        for field in sorted(fields & methods.find(recipe.method).reads(recipe))
        for key in getattr(recipe, field)
    ]
    if not given:
        return
    paths = [path for path, _ in methods.adapted_linears(architecture, recipe)]
    for field, key in given:
        if not any(methods.matching({key: True}, path) for path in paths):
            raise InputError(
                field, key, "matches no adapted module", "see `memplan inspect`"
            )


def _check_trained_modules(architecture: Architecture, recipe: Recipe) -> None:
    """As PEFT names modules: by the end of their path."""
    if not recipe.trained_modules:
        return
    paths = set(_module_paths(architecture))
    for name in recipe.trained_modules:
        if not any(path.endswith(name) for path in paths):
            known = dict.fromkeys(path.rpartition(".")[2] for path in sorted(paths))
            raise UnknownNameError("trained_modules", name, known)


def _module_paths(architecture: Architecture) -> Iterator[str]:
    """Paths of the modules that hold parameters, and of those around them."""
    held = [path for path, _ in architecture.all_linears()]
    held += [one.path.rpartition(".")[0] for one in architecture.parameters]
    if architecture.tied:
        held.append(TIED_HEAD)
    for block in architecture.blocks:
        for path in block.paths:
            held += [
                f"{path}.{one.path.rpartition('.')[0]}" for one in block.parameters
            ]
    for path in held:
        while path:
            yield path
            path = path.rpartition(".")[0]


def _check_base(recipe: Recipe) -> None:
    """Raises InputError for a base whose layers the method's tuner does not know."""
    scheme, method = (
        quantizations.find(recipe.quantization),
        methods.find(recipe.method),
    )
    if scheme.lora_only and not method.by_lora:
        raise InputError(
            "quantization",
            recipe.quantization,
            f"is known to PEFT's LoRA alone, which method {recipe.method} is none of",
            "use nf4-double, or another method",
        )
    if scheme.lora_only and recipe.method == "dora":
        raise InputError(
            "quantization",
            recipe.quantization,
            "is not simulated under DoRA, which copies its layers",
            "use nf4-double, or another method",
        )
    if recipe.method == "relora" and scheme.merge_problem:
        raise InputError(
            "quantization",
            recipe.quantization,
            f"cannot carry ReLoRA: merging into it {scheme.merge_problem}",
            "use nf4-double, or another method",
        )
    if recipe.method == "dora" and recipe.quantization == "nf4-icq":
        raise InputError(
            "quantization",
            recipe.quantization,
            "cannot carry DoRA: PEFT takes norms of its codes without their shifts",
            "use nf4-double",
        )


def _check_card(recipe: Recipe, gpu: Gpu | None) -> None:
    if gpu is None or recipe.quantization != "int8":
        return
    if gpu.compute_capability < SMALLEST_INT8_CAPABILITY:
        major, minor = gpu.compute_capability
        raise InputError(
            "quantization",
            recipe.quantization,
            f"needs compute capability 7.5, and {gpu.name} has {major}.{minor}",
            "use nf4-double, or another card",
        )


def _position_notes(architecture: Architecture, recipe: Recipe) -> Iterator[str]:
    longest = architecture.max_positions
    if longest is not None and recipe.sequence_length > longest:
        yield (
            f"The sequence is longer than the {longest} positions that "
            f"{architecture.name} was configured for."
        )


def _recipe_notes(recipe: Recipe) -> Iterator[str]:
    quantized = recipe.quantization != "none"
    if recipe.checkpointing == "none":
        for key, default in (("every_n_layers", 1), ("offload", False)):
            if getattr(recipe, key) != default:
                yield f"Without checkpointing, {key} has no effect."
    if recipe.method == "dora" and recipe.dropout > 0 and quantized:
        yield (
            "DoRA with dropout on a quantised base keeps a dense copy of every adapted "
            "weight for backward."
        )
    if recipe.autocast != "none" and not quantized and recipe.dtype == "float32":
        yield (
            "Autocast copies frozen float32 weights at every use and keeps the copies "
            "for backward."
        )
    if recipe.trainer == "trl" and recipe.loss == "liger":
        yield (
            "SFTTrainer of TRL 1.16 refuses Liger's fused loss, for it fuses the head "
            "itself: loss chunked."
        )
    if recipe.optimizer.startswith("paged-"):
        yield "States of 100,000 numbers and more are paged; smaller ones are not."


def _card_notes(recipe: Recipe, gpu: Gpu | None) -> Iterator[str]:
    if gpu is None or gpu.native_bf16:
        return
    precisions = [recipe.dtype, recipe.autocast]
    if recipe.quantization != "none":
        precisions.append(recipe.compute_dtype)
    if "bfloat16" in precisions:
        yield f"{gpu.name} has no native bfloat16; it runs, slowly."
