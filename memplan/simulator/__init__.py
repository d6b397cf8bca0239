"""`simulate`: the real step on meta tensors, replayed through the allocator's rules."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from memplan import optimizers
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.footprint import Footprint
from memplan.gpu import Gpu
from memplan.recipe import Recipe
from memplan.simulator.events import EventLog
from memplan.simulator.load import Loader
from memplan.simulator.replay import Replay, replay
from memplan.simulator.reroute import Reroute
from memplan.simulator.trace import Tracer
from memplan.training import model as training_model
from memplan.training.attention import repeated_heads
from memplan.training.step import Loop

STEPS = 2
"""The first step makes the optimizer's state; every later one is like the second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A traced fine-tune: its events, and what was trained."""

    log: EventLog
    total_parameters: int
    trainable_parameters: int
    paged_bytes: int
    operators: dict[Any, int]


def trace(
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu,
    progress: Callable[[str], None] = lambda label: None,
) -> Trace:
    """Runs load, adaptation and two steps on meta tensors, logging allocations."""
    log = EventLog()
    tracer = Tracer(gpu, log, padded=recipe.padded)

    @contextlib.contextmanager
    def phase(label: str) -> Iterator[None]:
        progress(label)
        log.begin(label)
        yield

    with _no_warnings(), _no_initialization():
        with phase("load"):
            model = training_model.build(architecture, recipe)
            Loader(tracer, recipe).load(model)
        reroute = Reroute(tracer, recipe)
        with reroute.installed(), repeated_heads(recipe.attention), tracer:
            with phase("adapt"):
                adapted = _adapt(model, architecture, recipe, tracer)
            tracer.vocab_size = architecture.vocab_size
            tracer.name_modules(adapted)
            loop = Loop(adapted, recipe, architecture.vocab_size, _labelled(phase, tracer, adapted))
            for number in range(1, STEPS + 1):
                loop.run_step(number, min(recipe.accumulation, 2))
            trained = training_model.trained_parameters(adapted)
            scheme = optimizers.find(recipe.optimizer)
            paged = sum(scheme.paged_bytes(tuple(p.shape)) for p in trained)
            trainable = sum(p.numel() for p in trained)
            tracer.stop()
    return Trace(
        log=log,
        total_parameters=architecture.total_parameters,
        trainable_parameters=trainable,
        paged_bytes=paged,
        operators=tracer.operators,
    )


def simulate(
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu,
    settings: AllocatorSettings = AllocatorSettings(),
) -> Footprint:
    """Bytes through the load, the adaptation and the steps of a fine-tune.

    Raises InputError for a recipe that cannot run on the card.
    """
    traced = trace(architecture, recipe, gpu)
    found = replay(traced.log, settings, gpu.budget_bytes)
    return Footprint(
        moments=tuple(found.moments),
        context_bytes=gpu.context_bytes,
        paged_bytes=traced.paged_bytes,
        capacity_bytes=gpu.capacity_bytes - gpu.reserve_bytes,
        failed_moment=found.failed_moment,
        missing_bytes=found.missing_bytes,
    )


def _adapt(
    model: nn.Module, architecture: Architecture, recipe: Recipe, tracer: Tracer
) -> nn.Module:
    training_model.prepare(model, recipe)
    if recipe.quantization != "none" and recipe.kbit_prepare:
        # The last line of prepare_model_for_kbit_training (peft >= 0.20).
        tracer.log.empty_cache()
    for parameter in model.parameters():
        tracer.label(parameter, "weights")
    return training_model.adapt(model, architecture, recipe)


def _labelled(
    phase: Callable[[str], Any], tracer: Tracer, model: nn.Module
) -> Callable[[str], Any]:
    """Phases after which gradients are labelled as such."""

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
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_initialization() -> Iterator[None]:
    """Leaves new adapters' values on the host as they are: memory does not need them."""
    names = ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_")
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(
                mock.patch(f"torch.nn.init.{name}", lambda tensor, *a, **k: tensor)
            )
        yield
