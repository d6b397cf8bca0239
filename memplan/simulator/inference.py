"""Simulates inference: load, adapters, the prompts read, token after token made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

from memplan import checks
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.gpu import Gpu, find_gpu
from memplan.inference import MERGED, NONE, Inference, loaded_as
from memplan.recipe import Recipe
from memplan.simulation import Sample, Simulation
from memplan.simulator import (
    UNNAMED_CARD,
    Trace,
    adapt,
    logged,
    simulation_of,
)
from memplan.simulator.events import EventLog
from memplan.simulator.host import load_bytes
from memplan.simulator.life import FewTokens, LifeTracer, Phase, numbered
from memplan.simulator.pattern import Pattern, find_pattern
from memplan.simulator.repetition import expand
from memplan.simulator.trace import Tracer


def run(  # noqa: PLR0913 - each is a part of what is simulated
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    gpu: Gpu | None = None,
    settings: AllocatorSettings | None = None,
    progress: Callable[[str], None] = lambda label: None,
    *,
    record: Callable[[Iterator[Sample]], None] | None = None,
) -> Simulation:
    """The simulation of a batch of prompts and their answers.

    Prompts are as long as the recipe's sequences. Raises InputError for what cannot
    run.
    """
    inference = inference.settled(architecture, recipe)
    loaded = loaded_as(recipe)
    adapted = inference.adapters != NONE
    notes = checks.check_inference(architecture, loaded, gpu, adapted=adapted)
    notes = (*notes, *inference.notes)
    card = gpu or find_gpu(UNNAMED_CARD)
    traced = trace(architecture, recipe, inference, card, progress)
    host = load_bytes(architecture, loaded)
    progress("replay")
    return simulation_of(traced, gpu, settings, notes=notes, host=host, record=record)


def trace(  # noqa: PLR0913 - each is a part of what is traced
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    gpu: Gpu,
    progress: Callable[[str], None] = lambda label: None,
    *,
    whole: bool = False,
) -> Trace:
    """Runs inference on meta tensors, logging allocations.

    Of layers that repeat few are run, unless `whole`.
    """
    recipe = loaded_as(recipe)
    pattern = None if whole else find_pattern(architecture, recipe)
    log = _log(architecture, recipe, inference, gpu, progress, pattern)
    expanded = None if pattern is None else expand(log, pattern, (1, 1))
    if pattern is not None and expanded is None:
        pattern = None
        expanded = _log(architecture, recipe, inference, gpu, progress, None)
    return Trace(
        log=log if expanded is None else expanded,
        total_parameters=architecture.total_parameters,
        trained=(),
        paged_bytes=0,
        kept=(),
        operators={},
        num_traced_layers=len(pattern.kept) if pattern else None,
    )


def _log(  # noqa: PLR0913 - each is a part of what is traced
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    gpu: Gpu,
    progress: Callable[[str], None],
    pattern: Pattern | None,
) -> EventLog:
    tracer = Tracer(gpu, EventLog(), padded=recipe.padded)
    with logged(architecture, recipe, tracer, progress, pattern) as (model, phase):
        answer(model, architecture, recipe, inference, tracer, phase)
        tracer.stop()
    return tracer.log


def answer(  # noqa: PLR0913 - each is a part of what is traced
    model: nn.Module,
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    tracer: Tracer,
    phase: Phase,
) -> None:
    """Gives a loaded model its adapters, and lets it answer a batch of prompts."""
    for parameter in model.parameters():
        tracer.label(parameter, "weights")
    if inference.adapters != NONE:
        model = _adapted(model, architecture, recipe, inference, tracer, phase)
    tracer.vocab_size = architecture.vocab_size
    tracer.name_parameters(model)
    tracer.name_modules(model)
    generation = inference.generation(recipe)
    with numbered(model):
        FewTokens(
            model, recipe, architecture.vocab_size, generation, tracer=tracer
        ).run(phase)


def _adapted(  # noqa: PLR0913 - each is a part of what is traced
    model: nn.Module,
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    tracer: Tracer,
    phase: Phase,
) -> nn.Module:
    """The model with the adapters of a checkpoint, beside its weights or in them.

    PEFT makes adapters in the recipe's precision and copies the checkpoint's onto them
    (PeftModel.from_pretrained).
    """
    with phase("adapt"):
        adapted = adapt(model, architecture, recipe, tracer)
        tracer.name_parameters(adapted)
        tracer.name_modules(adapted)
        lived = LifeTracer(adapted, recipe, architecture, tracer, phase)
        lived.load_adapters()
    if inference.adapters != MERGED:
        return adapted
    merged = lived.merge()
    lived.label_frozen(merged)
    return merged
