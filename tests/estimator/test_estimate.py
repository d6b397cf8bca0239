"""The estimate beside the simulation, and the physics that it must keep."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import tapes
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.estimator import estimate, run
from memplan.estimator.sweep import sweep
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from tests.estimate_report import judge, judged_grid, needs_no_torch
from tests.simulated_grid import read_grid

LLAMA = "meta-llama/Llama-3.2-1B"
CARD = find_gpu("RTX 3060")


def footprint(**keys: Any) -> Footprint:
    return estimate(inspect(LLAMA), Recipe(**keys), CARD)


def peak(**keys: Any) -> int:
    return footprint(**keys).peak.allocated_bytes


SHIPPED = [row for row in read_grid() if needs_no_torch(row)]


def test_a_good_part_of_the_grid_needs_no_torch() -> None:
    assert len(SHIPPED) >= 20


def test_allocated_peaks_equal_the_simulated_ones() -> None:
    errors = [abs(judge(row).allocated) for row in SHIPPED]
    within = sum(error <= 0.03 for error in errors) / len(errors)

    assert statistics.median(errors) <= 0.01
    assert within >= 0.95
    assert max(errors) <= 0.10


@pytest.mark.slow
def test_the_whole_grid_is_as_the_report_says() -> None:
    judged, _ = judged_grid()
    errors = [abs(one.allocated) for one in judged]

    assert len(errors) >= 290
    assert statistics.median(errors) <= 0.01
    assert sum(error <= 0.03 for error in errors) / len(errors) >= 0.95


def test_moments_are_the_simulation_s() -> None:
    labels = [moment.label for moment in footprint(max_grad_norm=1.0).moments]

    assert labels == [
        "load",
        "adapt",
        *(
            f"{step}.{phase}"
            for step in (1, 2)
            for phase in ("forward", "backward", "clip", "optimizer")
        ),
    ]


def test_the_breakdown_sums_to_the_device_s_bytes() -> None:
    found = footprint(quantization="nf4-double")

    assert sum(found.breakdown.values()) == found.device_bytes(found.peak)


class Knobs(NamedTuple):
    """A recipe to be taken twice, with more of one knob."""

    knob: str
    low: int
    factor: int
    keys: dict[str, Any]


KNOBS = st.builds(
    Knobs,
    knob=st.sampled_from(["rank", "batch_size", "sequence_length"]),
    low=st.sampled_from([1, 4, 8, 16]),
    factor=st.sampled_from([2, 4]),
    keys=st.fixed_dictionaries(
        {
            "method": st.sampled_from(["lora", "dora"]),
            "quantization": st.sampled_from(["none", "int8", "nf4-double"]),
            "checkpointing": st.sampled_from(["none", "full"]),
        }
    ),
)


@given(KNOBS)
@settings(max_examples=40, deadline=None)
def test_more_never_takes_less(knobs: Knobs) -> None:
    scale = 128 if knobs.knob == "sequence_length" else 1

    less = peak(**knobs.keys, **{knobs.knob: knobs.low * scale})
    more = peak(**knobs.keys, **{knobs.knob: knobs.low * knobs.factor * scale})

    assert more >= less


def test_fewer_bits_never_take_more() -> None:
    weights = [
        run(
            inspect(LLAMA), Recipe(quantization=name, kbit_prepare=False), CARD
        ).parts.weights.total
        for name in ("none", "int8", "nf4", "nf4-double")
    ]

    assert weights == sorted(weights, reverse=True)


def test_a_sweep_says_what_single_estimates_say() -> None:
    recipe = Recipe(quantization="nf4-double", checkpointing="full")
    batches, lengths, ranks = [1, 4, 2], [512, 128, 4096], [8, 16, 64]

    found = sweep(
        inspect(LLAMA),
        recipe,
        [CARD],
        batch_size=batches,
        sequence_length=lengths,
        rank=ranks,
    )

    alone = [
        peak(
            quantization="nf4-double",
            checkpointing="full",
            batch_size=batch,
            sequence_length=length,
            rank=rank,
        )
        for batch, length, rank in zip(batches, lengths, ranks, strict=True)
    ]
    assert abs(found.allocated_bytes - alone).max() <= 16


def test_a_sweep_of_ranks_refuses_a_pattern() -> None:
    recipe = Recipe(rank_pattern={"q_proj": 8})

    with pytest.raises(InputError, match="rank_pattern"):
        sweep(inspect(LLAMA), recipe, [CARD], rank=[8, 16])


def test_a_hundred_thousand_recipes_are_one_call() -> None:
    lengths = list(range(1, 100_001))
    begun = time.process_time()

    found = sweep(inspect(LLAMA), Recipe(), [CARD], sequence_length=lengths)

    assert found.fits[0]
    assert not found.fits[-1]
    assert time.process_time() - begun < 20


def test_adapted_experts_are_refused_by_name() -> None:
    mixtral = inspect("mistralai/Mixtral-8x7B-v0.1")

    with pytest.raises(InputError, match="adapts the stacked experts"):
        estimate(mixtral, Recipe())


def test_equal_configurations_share_their_tapes() -> None:
    assert tapes.name_of(inspect(LLAMA)) == tapes.name_of(inspect(LLAMA.lower()))
