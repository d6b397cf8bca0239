"""Rows of `profiles/ground_truth/t4_runs.json`, whose README says what was read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from memplan.footprint import Footprint, Moment
from memplan.gpu import find_gpu
from memplan.profile import Profile, slug
from memplan.units import MIB
from memplan.validation import Readings, read_t4_run


def from_row(number: int, row: Mapping[str, Any]) -> Profile:
    """The run of a row; the steady step's reserved peak is known as a whole alone."""
    run = read_t4_run(number, row, find_gpu(row["gpu"]))
    measured = row["measured"]
    context_bytes = round(measured["cuda_context_mib"] * MIB)
    quantization = run.recipe.quantization
    name = f"t4-{number:02d}-{slug(run.model.rpartition('/')[2])}-{quantization}"
    return Profile(
        id=name,
        source=f"fitcheck {run.archive}",
        device="cuda",
        model=run.architecture_name,
        recipe=run.recipe,
        gpu=replace(run.gpu, context_bytes=context_bytes, assumptions=()),
        footprint=Footprint(
            moments=_moments(run.readings), context_bytes=context_bytes
        ),
        parameters={
            "total": measured["total_params"],
            "trainable": measured["trainable_params"],
        },
        step_seconds=(measured["step_seconds"],),
        weights="checkpoint",
    )


def _moments(readings: Readings) -> tuple[Moment, ...]:
    phases = {
        "2.forward": readings.forward_bytes,
        "2.backward": readings.backward_bytes,
        "2.optimizer": readings.optimizer_bytes,
    }
    return (
        Moment(
            label="adapt",
            allocated_bytes=0,
            reserved_bytes=0,
            end_allocated_bytes=readings.after_load_bytes,
        ),
        *(
            Moment(label=label, allocated_bytes=size, reserved_bytes=0)
            for label, size in phases.items()
        ),
        Moment(
            label="2.step",
            allocated_bytes=readings.allocated_bytes,
            reserved_bytes=readings.reserved_bytes,
        ),
    )
