"""PEFT's LoraConfig of a recipe, and the proof that it installs what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.exporters import Statement, Task
from memplan.planner.modules import (
    adapted_linears,
    alphas_of,
    pattern_of,
    ranks_of,
)

FLAGS: Mapping[str, Mapping[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}
"""Methods that are a LoraConfig, with what they set in it."""


def lora_config(task: Task) -> dict[str, Any]:
    """The keys of adapter_config.json (peft.LoraConfig), ranks by whole paths.

    Raises InputError for a method that is no LoraConfig.
    """
    recipe = task.recipe
    check_method(task)
    paths = [*adapted_linears(task.architecture, recipe)]
    ranks, alphas = ranks_of(recipe, paths), alphas_of(recipe, paths)
    other_ranks = {p: rank for p, rank in ranks.items() if rank != recipe.rank}
    other_alphas = {p: alpha for p, alpha in alphas.items() if alpha != recipe.alpha}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": task.model,
        "r": recipe.rank,
        "lora_alpha": whole(recipe.alpha),
        "lora_dropout": recipe.dropout,
        "bias": "none",
        "target_modules": list(target_names(task.architecture, paths)),
        "rank_pattern": pattern_of(other_ranks),
        "alpha_pattern": {
            key: whole(alpha) for key, alpha in pattern_of(other_alphas).items()
        },
        "modules_to_save": list(recipe.trained_modules) or None,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": False,
        **FLAGS[recipe.method],
    }


def check_method(task: Task) -> None:
    """Raises InputError for a method that is no LoraConfig."""
    if task.recipe.method not in FLAGS:
        raise InputError(
            "method",
            task.recipe.method,
            "has no configuration that this trainer takes",
            f"use one of: {', '.join(FLAGS)}",
        )


def target_names(architecture: Architecture, paths: Iterable[str]) -> tuple[str, ...]:
    """The ends of the paths where these name no other layer; else the whole paths."""
    wanted = set(paths)
    ends = {path.rpartition(".")[2] for path in wanted}
    named = {
        path
        for path, _ in architecture.all_linears()
        if path.rpartition(".")[2] in ends
    }
    return tuple(sorted(ends if named == wanted else wanted))


def whole(number: float) -> int | float:
    """A whole number as an integer, as configurations write it."""
    return int(number) if number == int(number) else number


def verify(task: Task, config: Mapping[str, Any]) -> Statement:
    """That PEFT installs the configuration as the recipe is planned.

    Raises InputError where it installs anything else.
    """
    try:
        from memplan.training import installed
    except ModuleNotFoundError as error:
        missing = f"ranks and counts, as {error.name} is not installed here."
        return Statement(unverified=(missing,))
    planned = installed.of_recipe(task.architecture, task.recipe)
    found = installed.of_config(task.architecture, task.recipe, config)
    _compare(task, planned.ranks, found.ranks, "rank")
    _compare(task, planned.scales, found.scales, "scale")
    wanted = ranks_of(task.recipe, adapted_linears(task.architecture, task.recipe))
    _compare(task, wanted, {p: found.ranks.get(p, 0) for p in wanted}, "rank")
    if planned.trainable != found.trainable:
        raise _unfaithful(task, f"{found.trainable} trained parameters")
    unmatched = installed.unmatched_keys(config, found.ranks)
    if unmatched:
        raise _unfaithful(task, f"the key {unmatched[0]!r}, which matches nothing")
    sentence = (
        f"PEFT {installed.peft_version()} installs it on the meta device with the "
        f"planned rank and scale in each of {len(found.ranks)} modules, "
        f"{found.trainable:,} trained parameters, and no key unmatched."
    )
    return Statement(verified=(sentence,))


def _compare(
    task: Task, planned: Mapping[str, float], found: Mapping[str, float], what: str
) -> None:
    for path in sorted({*planned, *found}):
        if planned.get(path) != found.get(path):
            raise _unfaithful(
                task,
                f"{what} {found.get(path)} at {path} where {planned.get(path)} is "
                "planned",
            )


def _unfaithful(task: Task, problem: str) -> InputError:
    return InputError(
        "recipe",
        task.recipe.targets,
        f"cannot be exported as it is: PEFT would have {problem}",
        "name the targets, such as targets attention",
    )
