"""Spectra of layers' inputs, and the error of quantised weights, beside numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import architecture, built, tiny_recipe

from memplan.planner.modules import adapted_linears
from memplan.recipe import Recipe
from memplan.training.layer_inputs import SAMPLED_TOKENS, input_spectra, shares_of
from memplan.training.weight_error import squared_error


def test_shares_are_those_of_the_second_moment() -> None:
    inputs = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))

    shares = shares_of(inputs)

    rows = inputs.reshape(-1, 5).double().numpy()
    moments = np.linalg.eigvalsh(rows.T @ rows)[::-1]
    assert shares.numpy() == pytest.approx(moments / moments.sum())


def test_inputs_of_one_direction_have_one_share() -> None:
    inputs = torch.outer(torch.arange(1.0, 2000.0), torch.ones(8))

    shares = shares_of(inputs)

    assert len(shares) == 8
    assert float(shares[0]) == pytest.approx(1.0)
    assert len(shares_of(torch.randn(2000, 1024))) == SAMPLED_TOKENS


def test_spectra_of_a_model_are_by_path_and_leave_it_as_it_was() -> None:
    model = built("llama")
    paths = [*adapted_linears(architecture("llama"), tiny_recipe())]
    ids = torch.randint(128, (2, 16), generator=torch.Generator().manual_seed(0))
    before = len(model.get_submodule(paths[0])._forward_pre_hooks)

    spectra = input_spectra(model, [{"input_ids": ids}] * 2, paths)

    assert list(spectra) == paths
    for shares in spectra.values():
        assert sum(shares) == pytest.approx(1.0)
        assert shares == sorted(shares, reverse=True)
    query, key = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    assert spectra[query] == spectra[key], "they see the same inputs"
    assert len(model.get_submodule(paths[0])._forward_pre_hooks) == before


@pytest.mark.parametrize(
    ("quantization", "low", "high"),
    [("none", 0, 0), ("int8", 1e-5, 5e-4), ("nf4", 5e-3, 1.2e-2), ("fp4", 1e-2, 4e-2)],
)
def test_error_of_normal_weights(quantization: str, low: float, high: float) -> None:
    """NF4 loses near 0.9 % of a normal weight's square, and fp4 more."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    recipe = Recipe(quantization=quantization, compute_dtype="float32")

    error = squared_error(weight, recipe) / float(weight.square().sum())

    assert low <= error <= high
