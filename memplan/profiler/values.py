"""What a checkpoint's layers see of some texts, and what quantising them costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from memplan.architecture import Architecture
from memplan.profiler.data import first_sequences
from memplan.profiler.task import Task
from memplan.recipe import Recipe
from memplan.training import model as training_model
from memplan.training.layer_inputs import input_spectra
from memplan.training.weight_error import squared_error
from memplan.values import Values

SEQUENCES = 64
"""Texts that are looked at, the first of the file: as many as EVA's default batches
hold, and a forward pass each."""

DIRECTIONS = 128
"""Directions whose shares are kept: no rank that is planned is larger."""

DIGITS = 7


def measure_values(
    architecture: Architecture,
    recipe: Recipe,
    paths: Iterable[str],
    *,
    data: str,
    device: str,
) -> Values:
    """Values of the layers at `paths`, of the checkpoint that the model's name finds.

    The weights are loaded unquantised in the recipe's precision; texts are cut to its
    sequence length. `recipe.quantization` is whose errors are told. Raises InputError
    where weights, tokenizer or texts cannot be read.
    """
    named = tuple(paths)
    plain = Recipe(dtype=recipe.dtype, sequence_length=recipe.sequence_length)
    task = Task(
        model=architecture.name,
        config=architecture.config,
        recipe=plain,
        device=device,
        data=data,
    )
    texts = first_sequences(task, SEQUENCES)
    place = torch.device(device)
    model = training_model.load(architecture, plain, architecture.name, place).eval()
    batches = ({"input_ids": torch.tensor([one], device=place)} for one in texts)
    spectra = input_spectra(model, batches, named)
    return Values(
        model=architecture.name,
        basis=f"the first {len(texts)} texts of {data}, of {recipe.sequence_length} "
        "tokens at most, through the checkpoint's weights",
        spectra={path: _kept(shares) for path, shares in spectra.items()},
        quantization=recipe.quantization,
        errors=dict(_errors(model, recipe, named)),
    )


def _kept(shares: list[float]) -> tuple[float, ...]:
    return tuple(round(share, DIGITS) for share in shares[:DIRECTIONS])


def _errors(
    model: nn.Module, recipe: Recipe, paths: Iterable[str]
) -> Iterator[tuple[str, float]]:
    for path in paths:
        weight = model.get_submodule(path).weight
        assert isinstance(weight, torch.Tensor)
        yield path, squared_error(weight.cpu(), recipe)
