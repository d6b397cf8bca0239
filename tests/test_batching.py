"""What lengths make of batches: shapes by hand, bytes by estimates of those shapes."""

from __future__ import annotations

import pytest
from small_llama import architecture

from memplan import estimator
from memplan.batching import batches, fewer_steps, longest_batch
from memplan.gpu import find_gpu
from memplan.lengths import Lengths
from memplan.recipe import Recipe

LENGTHS = Lengths(counts=((64, 97), (128, 2), (512, 1)))
GPU = find_gpu("12GB")
RECIPE = longest_batch(Recipe(batch_size=2), LENGTHS, padded=None)


def test_the_longest_sample_decides() -> None:
    assert (RECIPE.sequence_length, RECIPE.padded) == (512, True)


@pytest.mark.parametrize(
    ("batch_size", "counts", "padded", "expected"),
    [
        (1, ((64, 1), (128, 1)), None, False),
        (2, ((64, 5),), None, False),
        (2, ((64, 1), (128, 1)), None, True),
        (2, ((64, 1), (128, 1)), False, False),
        (1, ((64, 5),), True, True),
    ],
)
def test_a_mask_is_made_where_samples_are_padded(
    batch_size: int,
    counts: tuple[tuple[int, int], ...],
    padded: bool | None,
    expected: bool,
) -> None:
    recipe = Recipe(batch_size=batch_size)
    lengths = Lengths(counts=counts)

    assert longest_batch(recipe, lengths, padded=padded).padded is expected


def test_shapes_are_those_of_the_samples() -> None:
    found = {
        batch.name: (
            batch.recipe.batch_size,
            batch.recipe.sequence_length,
            batch.recipe.padded,
        )
        for batch in batches(architecture(), RECIPE, GPU, LENGTHS)
    }

    mean = (97 * 64 + 2 * 128 + 512) / 100
    assert found == {
        "p50": (2, 64, True),
        "p99": (2, 128, True),
        "longest": (2, 512, True),
        "packed": (2, 512, False),
        "padding-free": (1, 512 + 128, False),
        "padding-free mean": (1, round(2 * mean), False),
    }


def test_bytes_are_estimates_of_the_shapes() -> None:
    for batch in batches(architecture(), RECIPE, GPU, LENGTHS):
        assert (
            batch.footprint
            == estimator.run(architecture(), batch.recipe, GPU).footprint
        )


def test_packing_takes_as_many_steps_as_its_tokens_fill() -> None:
    tokens = 97 * 64 + 2 * 128 + 512
    padded_steps, packed_steps = 100 / 2, tokens / (2 * 512)

    assert fewer_steps(RECIPE, LENGTHS) == pytest.approx(
        1 - packed_steps / padded_steps
    )


def test_a_batch_that_cannot_run_says_why() -> None:
    pinned = longest_batch(
        Recipe(batch_size=2, attention="flash"), LENGTHS, padded=None
    )
    found = {b.name: b for b in batches(architecture(), pinned, GPU, LENGTHS)}

    assert "mask" in found["longest"].problem
    assert found["longest"].footprint is None
    assert found["packed"].footprint is not None
