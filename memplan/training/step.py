"""A training loop: forward, backward, clip, optimizer; each a phase that is announced.

The same code runs over meta tensors, where its allocations are traced, and over real
ones, where they are measured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from memplan import methods, optimizers
from memplan.recipe import Recipe
from memplan.training.batch import make_batch
from memplan.training.loss import read_loss, run_forward
from memplan.training.model import trained_parameters


class Loop:
    """Runs the steps of a recipe on an adapted model."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        vocab_size: int,
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._method = methods.find(recipe.method)
        self._vocab_size = vocab_size
        self._phase = phase
        self._device = trained_parameters(model)[0].device
        self._outputs: Any = None
        """The model's output, where the loop holds it from one step to the next."""

    @functools.cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the trained parameters, without state until a step ran."""
        return build_optimizer(self._model, self._recipe)

    def run_step(self, number: int, micro_batches: int) -> None:
        """One optimizer step over so many micro-batches."""
        optimizer = self.optimizer
        for _ in range(micro_batches):
            self._run_micro_batch(number, micro_batches)
        if self._recipe.max_grad_norm is not None:
            with self._phase(f"{number}.clip"):
                torch.nn.utils.clip_grad_norm_(
                    trained_parameters(self._model), self._recipe.max_grad_norm
                )
        with self._phase(f"{number}.optimizer"):
            optimizer.step()
            self._method.after_step(self._model, optimizer, number)
            optimizer.zero_grad(set_to_none=True)
        if self._recipe.keep_outputs == "backward":
            self._outputs = None

    def reach_milestone(self) -> None:
        """What the method does now and then between steps, under its own label."""
        label = self._method.milestone(self._recipe)
        assert label is not None
        with self._phase(label):
            self._method.reach_milestone(self._model, self._recipe, self.optimizer)

    def _run_micro_batch(self, number: int, micro_batches: int) -> None:
        keep = self._recipe.keep_outputs
        if keep == "backward":
            self._outputs = None
        with self._phase(f"{number}.forward"):
            batch = make_batch(self._recipe, self._vocab_size, self._device)
            with autocast(self._recipe, self._device):
                outputs = run_forward(self._model, batch, self._recipe)
            outputs, loss = read_loss(outputs, self._recipe)
            if micro_batches > 1:
                loss = loss / micro_batches
            self._outputs = None if keep == "none" else outputs
            del outputs
        with self._phase(f"{number}.backward"):
            loss.backward()
            del loss, batch


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer of what is trained, in the groups of its method."""
    scheme = optimizers.find(recipe.optimizer)
    optimizer = scheme.build_for(model, trained_parameters(model))
    methods.find(recipe.method).arrange(optimizer, model, recipe)
    return optimizer


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[Any]:
    """The recipe's autocast on a device; that of the card for meta tensors."""
    if recipe.autocast == "none":
        return contextlib.nullcontext()
    kind = "cuda" if device.type == "meta" else device.type
    return torch.autocast(kind, getattr(torch, recipe.autocast))


@contextlib.contextmanager
def silent(label: str) -> Iterator[None]:
    """A phase that nobody watches."""
    yield
