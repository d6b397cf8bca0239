"""What trainers built on transformers' `Trainer` share: names, and what they change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from memplan.errors import InputError
from memplan.exporters import Task
from memplan.recipe import Recipe, presets

OPTIMIZERS = {
    "adafactor": "adafactor",
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "adamw-fused": "adamw_torch_fused",
    "lion-8bit": "lion_8bit",
    "paged-adamw-32bit": "paged_adamw_32bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "paged-lion-8bit": "paged_lion_8bit",
    "sgd": "sgd",
}
"""transformers' names (training_args.OptimizerNames)."""

ATTENTION = {"auto": "sdpa", "eager": "eager"}
"""transformers' names; every kernel that is pinned is one of SDPA's."""


def optimizer_name(recipe: Recipe) -> str:
    """transformers' name of the optimizer; raises InputError where it has none."""
    if recipe.optimizer not in OPTIMIZERS:
        raise InputError(
            "optimizer",
            recipe.optimizer,
            "has no name in transformers' Trainer",
            f"use one of: {', '.join(OPTIMIZERS)}",
        )
    return OPTIMIZERS[recipe.optimizer]


def attention_name(recipe: Recipe) -> str:
    """transformers' `attn_implementation`."""
    return ATTENTION.get(recipe.attention, "sdpa")


def quantization_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys of BitsAndBytesConfig; none where nothing is quantised.

    Raises InputError for a scheme that is not bitsandbytes'.
    """
    if recipe.quantization == "none":
        return {}
    skipped = list(recipe.unquantized_modules)
    named: dict[str, Any] = {"llm_int8_skip_modules": skipped}
    if skipped == ["lm_head"]:
        # Left out, bitsandbytes' integration finds a head of any name by itself.
        named = {}
    if recipe.quantization == "int8":
        return {"load_in_8bit": True, **named}
    kind, _, double = recipe.quantization.partition("-")
    if kind not in ("nf4", "fp4"):
        raise InputError(
            "quantization",
            recipe.quantization,
            "is not one of bitsandbytes' schemes",
            "use nf4, nf4-double, fp4, fp4-double or int8",
        )
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double == "double",
        "bnb_4bit_compute_dtype": recipe.compute_dtype,
        **named,
    }


def differences(task: Task, trainer: str, kept: Collection[str] = ()) -> Iterator[str]:
    """A sentence for each thing that a trainer does otherwise than the recipe says.

    `kept` are the recipe's keys that the files hand on to the trainer.
    """
    recipe = task.recipe
    for key, value in presets(trainer, recipe.quantization).items():
        if key not in kept and getattr(recipe, key) != value:
            yield (
                f"The plan has {key} {getattr(recipe, key)}, and this trainer "
                f"{value}: its peak differs. Plan with --trainer {trainer}."
            )
    if not recipe.input_casts:
        yield (
            "The plan keeps adapters from casting their inputs; wrap the training in "
            "peft.helpers.disable_input_dtype_casting to have it so."
        )


def checkpointing_keys(recipe: Recipe) -> dict[str, Any]:
    """transformers 5.23's arguments; every one of them is named."""
    if recipe.checkpointing == "none":
        return {"activation_checkpointing": False}
    options: dict[str, Any] = {"use_reentrant": recipe.reentrant}
    if recipe.every_n_layers > 1:
        options["every_n_layers"] = recipe.every_n_layers
    if recipe.offload:
        options["offload"] = True
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": options,
    }


def former_checkpointing_keys(recipe: Recipe) -> dict[str, Any]:
    """The arguments before transformers 5.23, which knew neither n nor offload.

    Raises InputError for a recipe that needs these.
    """
    if recipe.checkpointing == "none":
        return {"gradient_checkpointing": False}
    for key, default in (("every_n_layers", 1), ("offload", False)):
        if getattr(recipe, key) != default:
            raise InputError(
                key,
                getattr(recipe, key),
                "is not known to this trainer",
                "leave it out, or export to trl",
            )
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": recipe.reentrant},
    }
