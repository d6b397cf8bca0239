"""The bytes of a fine-tune's tensors on a CPU, as the profiler's CPU meter counts them.

What is simulated is the same fine-tune as for a card, by the functions and kernels that
PyTorch takes on a CPU: its own attention, its own autocast, no lists of tensors in one
kernel where the recipe does not ask for them. What a kernel takes for itself while it
runs is left out, as are rounding and cache: a CPU has no caching allocator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from memplan import checks
from memplan.architecture import Architecture
from memplan.footprint import Footprint, Moment
from memplan.gpu import find_gpu
from memplan.inference import NONE, Inference, loaded_as
from memplan.recipe import Recipe
from memplan.simulator import (
    STEPS,
    UNNAMED_CARD,
    adapt,
    logged,
)
from memplan.simulator.events import FREE, MARK, EventLog
from memplan.simulator.inference import answer
from memplan.simulator.life import LifeTracer
from memplan.simulator.trace import Tracer
from memplan.training.step import Loop


def simulate_on_cpu(architecture: Architecture, recipe: Recipe) -> Footprint:
    """Bytes of tensors through the load, the adaptation and the steps on a CPU.

    After two steps comes what the method does between steps, and one more step.
    What is reserved is what is allocated. Raises InputError for a recipe that cannot
    run.
    """
    notes = checks.check(architecture, recipe, None)
    log = _trace(architecture, dataclasses.replace(recipe, offload=False))
    return Footprint(moments=tuple(_moments(log)), notes=notes)


def simulate_inference_on_cpu(
    architecture: Architecture, recipe: Recipe, inference: Inference
) -> Footprint:
    """Bytes of tensors through inference on a CPU; errors likewise."""
    inference = inference.settled(architecture, recipe)
    recipe = loaded_as(recipe)
    adapted = inference.adapters != NONE
    notes = checks.check_inference(architecture, recipe, None, adapted=adapted)
    tracer = _tracer(recipe)
    with logged(architecture, recipe, tracer, cpu=True) as (model, phase):
        answer(model, architecture, recipe, inference, tracer, phase)
        tracer.stop()
    return Footprint(moments=tuple(_moments(tracer.log)), notes=notes)


def _trace(architecture: Architecture, recipe: Recipe) -> EventLog:
    tracer = _tracer(recipe)
    with logged(architecture, recipe, tracer, cpu=True) as (model, phase):
        with phase("adapt"):
            adapted = adapt(model, architecture, recipe, tracer)
        loop = Loop(adapted, recipe, architecture.vocab_size, phase)
        for number in range(1, STEPS + 1):
            loop.run_step(number, recipe.accumulation)
        lived = LifeTracer(adapted, recipe, architecture, tracer, phase, cpu=True)
        lived.reach_milestone(loop, STEPS)
        tracer.stop()
    return tracer.log


def _tracer(recipe: Recipe) -> Tracer:
    card = find_gpu(UNNAMED_CARD)
    return Tracer(card, EventLog(), padded=recipe.padded, scratch=False)


def _moments(log: EventLog) -> Iterator[Moment]:
    """The log's moments, those of one label as one."""
    found: dict[str, Moment] = {}
    live = peak = 0
    label = ""

    def end() -> None:
        moment = Moment(
            label=label,
            allocated_bytes=peak,
            reserved_bytes=peak,
            end_allocated_bytes=live,
        )
        found[label] = found[label].merged(moment) if label in found else moment

    for block, num_bytes in log.events:
        if block == MARK:
            if label:
                end()
            label, peak = log.labels[num_bytes], live
        elif num_bytes == FREE:
            live -= log.sizes[block]
        elif block >= 0:
            live += num_bytes
            peak = max(peak, live)
    end()
    yield from found.values()
