"""Predictions beside public benchmarks; the bars are published_report's."""

from __future__ import annotations

from collections.abc import Sequence

import published_report
import pytest
from published_report import (
    CAST_BACK,
    WORST,
    WORST_AFTER_TRAINING,
    Compared,
    published_runs,
)

RUNS = published_runs()

SLICE = (1, 16, 22)
"""TRL's chunked loss, full fine-tuning at 5 x weights, QLoRA with a stand-in."""

WEIGHTS_BYTES = 14_483_464_192
"""Mistral-7B-v0.1's 7,241,732,096 parameters in 16 bits."""


@pytest.fixture(scope="module")
def compared() -> Sequence[Compared]:
    return [published_report.compare(run) for run in RUNS]


@pytest.mark.parametrize("number", SLICE)
def test_prediction_keeps_the_bar(number: int) -> None:
    each = published_report.compare(RUNS[number])

    assert abs(each.error) <= WORST[each.run.source]


def test_full_fine_tunes_were_published_at_five_times_their_weights() -> None:
    peaks = [run.allocated_bytes for run in RUNS if run.recipe.method == "full"]

    assert len(peaks) == 6
    assert max(peaks) / min(peaks) < 1.0001
    assert min(peaks) == pytest.approx(5 * WEIGHTS_BYTES, rel=0.001)


def test_stand_ins_change_what_older_libraries_did_and_nothing_else() -> None:
    for run in RUNS:
        if run.stand_in is None:
            continue
        asked, given = run.recipe.to_json(), run.stand_in.to_json()
        changed = {key for key in asked if asked[key] != given[key]}

        assert run.versions["transformers"].startswith("4.48.")
        assert changed <= {"trainer", "keep_outputs"}


@pytest.mark.slow
def test_every_run_keeps_the_bars(compared: Sequence[Compared]) -> None:
    for each in compared:
        after = each.after_training_error

        assert abs(each.error) <= WORST[each.run.source], each.run.number
        if after is not None and each.run.number not in CAST_BACK:
            assert abs(after) <= WORST_AFTER_TRAINING, each.run.number


@pytest.mark.slow
def test_committed_report_is_what_the_predictions_give(
    compared: Sequence[Compared],
) -> None:
    committed = published_report.REPORT.read_text(encoding="utf-8")

    assert committed == published_report.report(compared)
