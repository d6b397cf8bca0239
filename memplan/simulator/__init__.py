"""`simulate`: the real step on meta tensors, replayed through the allocator's rules."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import nn

from memplan import checks, optimizers, quantizations
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.life import CARD, HOST, NO_LIFE, Life
from memplan.recipe import Recipe
from memplan.simulation import Sample, Simulation
from memplan.simulator import allocator_notes
from memplan.simulator.events import EventLog
from memplan.simulator.host import Traced, Trained, host_bytes
from memplan.simulator.life import LifeTracer, Phase
from memplan.simulator.load import Loader
from memplan.simulator.pattern import Pattern, find_pattern
from memplan.simulator.repetition import expand
from memplan.simulator.replay import Replay, replay, samples
from memplan.simulator.reroute import Reroute
from memplan.simulator.trace import PEFT_PREFIX, Tracer
from memplan.training import model as training_model
from memplan.training.attention import repeated_heads
from memplan.training.step import Loop

STEPS = 2
"""The first step makes the optimizer's state; every later one is like the second."""

TRACED_MICRO_BATCHES = 2
"""The first makes the gradients; every later one adds to them like the second."""

UNNAMED_CARD = "80GB"
"""What stands for the card where none is named; its kernels are those of 8.6."""

MISSING_PRECISION = 128
"""One part in so many, to which what is missing is found."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A traced fine-tune: its events, and what was trained."""

    log: EventLog
    total_parameters: int
    trained: tuple[Trained, ...]
    paged_bytes: int
    kept: tuple[tuple[int, int], ...]
    """Counts and element sizes of what a batch of the evaluation adds to be kept."""
    operators: dict[Any, int]
    """How often each operator ran."""
    num_traced_layers: int | None
    """Layers that were run for all of their stack; None where every layer was."""

    @property
    def trainable_parameters(self) -> int:
        """Numbers that are trained."""
        return sum(one.count for one in self.trained)


def simulate(
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None = None,
    settings: AllocatorSettings | None = None,
) -> Footprint:
    """Bytes through the load, the adaptation and the steps of a fine-tune.

    Without a card, kernels are those of compute capability 8.6 and nothing limits
    memory. Raises InputError for a recipe that cannot run.

    >>> import memplan
    >>> gpt2 = memplan.inspect("openai-community/gpt2")
    >>> footprint = memplan.simulate(gpt2, memplan.Recipe(), memplan.find_gpu("T4"))
    >>> footprint.fits, footprint.peak.allocated_bytes <= footprint.peak.reserved_bytes
    (True, True)
    """
    return run(architecture, recipe, gpu, settings).footprint


def run(  # noqa: PLR0913 - each is a part of what is simulated
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None = None,
    settings: AllocatorSettings | None = None,
    progress: Callable[[str], None] = lambda label: None,
    *,
    life: Life = NO_LIFE,
    record: Callable[[Iterator[Sample]], None] | None = None,
    missing_precision: int = MISSING_PRECISION,
    advises: bool = True,
) -> Simulation:
    """The simulation of a fine-tune; `progress` is told of each moment that begins.

    `record` is given the memory after each event, as it was on the card, or on one that
    is large enough where the card is not. What is missing is found to one part in
    `missing_precision`, and is never too little. Where it does not fit, other settings
    of the allocator are tried only if the simulation `advises`.
    """
    notes = (*checks.check(architecture, recipe, gpu), *life.notes(recipe))
    card = gpu or find_gpu(UNNAMED_CARD)
    traced = trace(architecture, recipe, card, progress, life=life)
    host = _host_bytes(architecture, recipe, card, life, traced)
    progress("replay")
    return simulation_of(
        traced,
        gpu,
        settings,
        notes=notes,
        host=host,
        record=record,
        missing_precision=missing_precision,
        advises=advises,
    )


def simulation_of(  # noqa: PLR0913 - each is a part of what is simulated
    traced: Trace,
    gpu: Gpu | None,
    settings: AllocatorSettings | None,
    *,
    notes: tuple[str, ...],
    host: dict[str, int],
    record: Callable[[Iterator[Sample]], None] | None,
    missing_precision: int = MISSING_PRECISION,
    advises: bool = True,
) -> Simulation:
    """What a trace comes to on a card."""
    settings = settings or AllocatorSettings()
    found, missing_bytes = _replay_on_card(traced.log, settings, gpu, missing_precision)
    tries = advises or found.failed_moment is None
    if record is not None:
        if gpu is None or found.failed_moment is not None:
            told = samples(traced.log, _whole_card(settings), None)
        else:
            limits = gpu.budget_bytes, gpu.capacity_bytes
            told = samples(traced.log, settings, *limits)
        record(told)
    footprint = Footprint(
        moments=tuple(found.moments),
        context_bytes=gpu.context_bytes if gpu else None,
        paged_bytes=traced.paged_bytes,
        capacity_bytes=gpu.capacity_bytes - gpu.reserve_bytes if gpu else None,
        failed_moment=found.failed_moment,
        missing_bytes=missing_bytes,
        notes=(
            *notes,
            *_replay_notes(found),
            *(allocator_notes.notes(traced.log, settings, gpu, found) if tries else ()),
        ),
    )
    return Simulation(
        footprint=footprint,
        total_parameters=traced.total_parameters,
        trainable_parameters=traced.trainable_parameters,
        peak_blocks=found.peak_blocks,
        host=host,
    )


def _host_bytes(
    architecture: Architecture, recipe: Recipe, gpu: Gpu, life: Life, traced: Trace
) -> dict[str, int]:
    """Bytes on the host; a merge there is traced on its own, unquantised."""
    merge_log = None
    if life.merge == HOST:
        unquantized = dataclasses.replace(recipe, quantization="none")
        merging = Life(merge=CARD)
        merge_log = trace(architecture, unquantized, gpu, life=merging, steps=0).log
    told = Traced(log=traced.log, trained=traced.trained, kept=traced.kept)
    return host_bytes(architecture, recipe, life, told, merge_log)


def trace(  # noqa: PLR0913 - each is a part of what is traced
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu,
    progress: Callable[[str], None] = lambda label: None,
    *,
    whole: bool = False,
    life: Life = NO_LIFE,
    steps: int = STEPS,
) -> Trace:
    """Runs load, adaptation and steps on meta tensors, logging allocations.

    Of layers that repeat few are run, unless `whole`; the log is that of the whole
    model all the same.
    """
    task = _Task(
        architecture=architecture,
        recipe=recipe,
        gpu=gpu,
        progress=progress,
        life=life,
        steps=steps,
    )
    pattern = None if whole else find_pattern(architecture, recipe)
    if pattern is not None:
        traced = _trace(task, pattern)
        if traced is not None:
            return traced
    traced = _trace(task, None)
    assert traced is not None
    return traced


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What is to be traced."""

    architecture: Architecture
    recipe: Recipe
    gpu: Gpu
    progress: Callable[[str], None]
    life: Life
    steps: int


def _trace(task: _Task, pattern: Pattern | None) -> Trace | None:
    """The trace; None where layers turn out not to repeat as the pattern says."""
    architecture, recipe = task.architecture, task.recipe
    tracer = Tracer(task.gpu, EventLog(), padded=recipe.padded)
    log = tracer.log
    loaded = logged(architecture, recipe, tracer, task.progress, pattern)
    with loaded as (model, phase):
        with phase("adapt"):
            adapted = adapt(model, architecture, recipe, tracer)
        tracer.name_parameters(adapted)
        tracer.vocab_size = architecture.vocab_size
        tracer.name_modules(adapted)
        watched = _labelling_gradients(phase, tracer, adapted)
        lived = LifeTracer(adapted, recipe, architecture, tracer, phase)
        loop = lived.before_steps(
            task.life,
            lambda: Loop(adapted, recipe, architecture.vocab_size, watched),
        )
        for number in range(1, task.steps + 1):
            loop.run_step(number, min(recipe.accumulation, TRACED_MICRO_BATCHES))
        trained = _trained(adapted, pattern)
        lived.reach_milestone(loop, task.steps)
        lived.after_steps(task.life)
        tracer.stop()
    if pattern is not None:
        gradients = (len(trained), sum(one.copies for one in trained))
        expanded = expand(log, pattern, gradients)
        if expanded is None:
            return None
        log = expanded
    optimizer = optimizers.find(recipe.optimizer)
    return Trace(
        log=log,
        total_parameters=architecture.total_parameters,
        trained=trained,
        paged_bytes=0
        if task.life.resumes
        else sum(one.copies * optimizer.paged_bytes(one.shape) for one in trained),
        kept=lived.kept,
        operators=tracer.operators,
        num_traced_layers=len(pattern.kept) if pattern else None,
    )


@contextlib.contextmanager
def logged(  # noqa: PLR0913 - each is a part of what is traced
    architecture: Architecture,
    recipe: Recipe,
    tracer: Tracer,
    progress: Callable[[str], None] = lambda label: None,
    pattern: Pattern | None = None,
    *,
    cpu: bool = False,
) -> Iterator[tuple[nn.Module, Phase]]:
    """The loaded model, and what begins a moment; all that either does is logged.

    Of layers that repeat the model has those that the pattern keeps. With `cpu` it is
    as on a CPU.
    """

    @contextlib.contextmanager
    def phase(label: str) -> Iterator[None]:
        progress(label)
        tracer.log.begin(label)
        yield

    with no_warnings(), no_initialization():
        with phase("load"):
            kept = pattern.kept_layers if pattern else None
            model = training_model.build(architecture, recipe, kept)
            Loader(tracer, recipe, lambda path: num_copies(path, pattern)).load(model)
        with (
            Reroute(tracer, recipe, cpu=cpu).installed(),
            contextlib.nullcontext() if cpu else repeated_heads(recipe.attention),
            tracer,
        ):
            yield model, phase


def _trained(model: nn.Module, pattern: Pattern | None) -> tuple[Trained, ...]:
    return tuple(
        Trained(
            copies=num_copies(name.removeprefix(PEFT_PREFIX), pattern),
            shape=tuple(parameter.shape),
            element_bytes=parameter.element_size(),
        )
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    )


def num_copies(path: str, pattern: Pattern | None) -> int:
    """How many parameters of the whole model a traced one stands for."""
    return 1 if pattern is None else pattern.multiplicity(path)


def _replay_on_card(
    log: EventLog, settings: AllocatorSettings, gpu: Gpu | None, missing_precision: int
) -> tuple[Replay, int]:
    """The replay with the card's budget, and how many bytes more it would need.

    Where the budget does not suffice, the moments are those of a card that is large
    enough, and `failed_moment` is the first that fails on this one.
    """
    if gpu is None:
        return replay(log, settings, None), 0
    share = settings.per_process_memory_fraction
    budget_bytes = min(gpu.budget_bytes, int(share * gpu.capacity_bytes))
    limited = replay(log, settings, gpu.budget_bytes, gpu.capacity_bytes)
    if limited.failed_moment is None:
        return limited, 0
    settings = _whole_card(settings)
    unlimited = replay(log, settings, None)
    unlimited.failed_moment = limited.failed_moment
    enough = _smallest_budget(
        log, settings, budget_bytes, unlimited.moments, missing_precision
    )
    return unlimited, enough - budget_bytes


def _whole_card(settings: AllocatorSettings) -> AllocatorSettings:
    """The settings, but for the share of the card that the process may reserve."""
    return dataclasses.replace(settings, per_process_memory_fraction=1.0)


def _smallest_budget(
    log: EventLog,
    settings: AllocatorSettings,
    budget_bytes: int,
    unlimited: list[Moment],
    missing_precision: int,
) -> int:
    """About the smallest budget that suffices, with the cache given back in need.

    It lies between what is allocated and what is reserved without a limit.
    """
    allocated = max(moment.allocated_bytes for moment in unlimited)
    enough = max(moment.reserved_bytes for moment in unlimited)
    too_little = max(budget_bytes, allocated - 1)
    while (enough - too_little) * missing_precision > enough - budget_bytes:
        middle = (too_little + enough) // 2
        if replay(log, settings, middle).failed_moment is None:
            enough = middle
        else:
            too_little = middle
    return enough


def _replay_notes(found: Replay) -> Iterator[str]:
    if found.num_alloc_retries and found.failed_moment is None:
        yield (
            f"It fits only because the allocator gives its cache back "
            f"{found.num_alloc_retries} times, which is slow."
        )


def adapt(
    model: nn.Module, architecture: Architecture, recipe: Recipe, tracer: Tracer
) -> nn.Module:
    """The loaded model, prepared and with the recipe's method installed."""
    training_model.prepare(model, recipe)
    casts = quantizations.find(recipe.quantization).kbit_casts
    if recipe.quantization != "none" and recipe.kbit_prepare and casts:
        # The last line of prepare_model_for_kbit_training (peft >= 0.20).
        tracer.log.empty_cache()
    for parameter in model.parameters():
        tracer.label(parameter, "weights")
    return training_model.adapt(model, architecture, recipe)


def _labelling_gradients(
    phase: Callable[[str], AbstractContextManager[None]],
    tracer: Tracer,
    model: nn.Module,
) -> Callable[[str], AbstractContextManager[None]]:
    """The phases of a loop, after which gradients are labelled as such."""

    @contextlib.contextmanager
    def labelled(label: str) -> Iterator[None]:
        with phase(label):
            yield
        if label.endswith(".backward"):
            for parameter in training_model.trained_parameters(model):
                if parameter.grad is not None:
                    tracer.label(parameter.grad, "gradients")

    return labelled


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Keeps what libraries say about training on this machine off the terminal."""
    loggers = [logging.getLogger(name) for name in ("bitsandbytes", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def no_initialization() -> Iterator[None]:
    """Leaves the values of new adapters on the host as they are: none is read."""
    names = ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(
                mock.patch(f"torch.nn.init.{name}", lambda tensor, *a, **k: tensor)
            )
        yield
