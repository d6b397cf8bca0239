"""Predictions beside what other people measured; the bars are accuracy_report's."""

from __future__ import annotations

import statistics

import accuracy_report
import pytest
from accuracy_report import BARS, KNOWN_MISSES, Bar, Predicted

from memplan.catalog import inspect
from memplan.validation import Readings, t4_runs

RUNS = t4_runs()

SLICE = (10, 19, 29, 32, 38, 43, 44, 50)
"""Runs of every model, both kernels and both storages, long and short."""


@pytest.fixture(scope="module")
def predicted() -> Predicted:
    return accuracy_report.predict_all()


@pytest.mark.parametrize("number", SLICE)
def test_prediction_keeps_the_bars(number: int) -> None:
    from memplan.simulator import simulate

    run = RUNS[number]
    footprint = simulate(inspect(run.architecture_name), run.recipe, run.gpu)
    errors = Readings.of(footprint).errors(run.readings)

    assert footprint.fits
    for bar in BARS:
        if bar.worst is not None and run.recipe.quantization in bar.quantizations:
            for reading in bar.readings:
                assert abs(errors[reading]) <= bar.worst, bar.title


@pytest.mark.slow
@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.title)
def test_every_run_keeps_the_bar_but_for_the_known_misses(
    bar: Bar, predicted: Predicted
) -> None:
    errors = accuracy_report.errors_under(bar, predicted)
    median = statistics.median(map(abs, errors.values()))

    assert bar.median is None or median <= bar.median
    if bar.worst is not None:
        beyond = {key for key, error in errors.items() if abs(error) > bar.worst}

        assert beyond == errors.keys() & KNOWN_MISSES.keys()


@pytest.mark.slow
def test_committed_report_is_what_the_predictions_give(predicted: Predicted) -> None:
    committed = accuracy_report.REPORT.read_text(encoding="utf-8")

    assert committed == accuracy_report.report(predicted)
