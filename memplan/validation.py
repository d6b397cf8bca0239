"""Other people's measured fine-tunes, and how far predictions are from them.

The runs lie in `profiles/ground_truth`, whose README says how they were measured. No
prediction reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.errors import MemplanError
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe
from memplan.store import profiles_path, read_json
from memplan.units import MIB

STEADY_STEP = "2."
"""Begins the labels of the step that stands for those measured after a warm-up."""

_SAME_ARCHITECTURE = {"Qwen/Qwen2.5-1.5B-Instruct": "Qwen/Qwen2.5-1.5B"}
"""Measured models that differ from one of the catalog by their weights' values only."""

_ATTENTION = {"eager": "eager", "flash": "efficient"}
"""The attention of a run by its `kernel`; `flash` was pinned to memory-efficient."""

_PRECISION = {"fp16": "float16"}

_KEYS = {
    "after_load_bytes": "after_load_allocated_mib",
    "forward_bytes": "peak_forward_mib",
    "backward_bytes": "peak_backward_mib",
    "optimizer_bytes": "peak_optimizer_mib",
    "allocated_bytes": "peak_allocated_mib",
    "reserved_bytes": "peak_reserved_mib",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Readings:
    """What a run's counters say, or would say by a prediction."""

    after_load_bytes: int
    """Allocated when the model is adapted and no step has run."""
    forward_bytes: int
    """Allocated peak of a steady step's forward."""
    backward_bytes: int
    """Allocated peak of its backward."""
    optimizer_bytes: int
    """Allocated peak of its optimizer step."""
    allocated_bytes: int
    """Allocated peak of the whole step."""
    reserved_bytes: int
    """Reserved peak of the whole step, with what loading left in the cache."""

    @classmethod
    def of(cls, footprint: Footprint) -> Readings:
        """The readings that a footprint of two steps predicts."""
        moments = {moment.label: moment for moment in footprint.moments}
        steady = [m for m in footprint.moments if m.label.startswith(STEADY_STEP)]
        return cls(
            after_load_bytes=_moment(moments, "adapt").end_allocated_bytes,
            forward_bytes=_moment(moments, "2.forward").allocated_bytes,
            backward_bytes=_moment(moments, "2.backward").allocated_bytes,
            optimizer_bytes=_moment(moments, "2.optimizer").allocated_bytes,
            allocated_bytes=max(moment.allocated_bytes for moment in steady),
            reserved_bytes=max(moment.reserved_bytes for moment in steady),
        )

    def errors(self, measured: Readings) -> dict[str, float]:
        """How much more than measured each reading is, as a share of the measured."""
        return {
            reading: getattr(self, reading) / getattr(measured, reading) - 1
            for reading in READINGS
        }


READINGS = tuple(field.name for field in dataclasses.fields(Readings))


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredRun:
    """A fine-tune that somebody measured."""

    number: int
    """Its place in the file, from 0."""
    model: str
    """The model as it was loaded."""
    architecture_name: str
    """The catalog's model of the same architecture."""
    recipe: Recipe
    gpu: Gpu
    archive: str
    """The series of measurements that it belongs to."""
    readings: Readings


def t4_runs() -> tuple[MeasuredRun, ...]:
    """The 57 runs of LoRA and QLoRA on a Tesla T4."""
    rows = read_json(profiles_path() / "ground_truth" / "t4_runs.json")
    gpu = find_gpu("T4")
    return tuple(read_t4_run(number, row, gpu) for number, row in enumerate(rows))


def read_t4_run(number: int, row: Mapping[str, Any], gpu: Gpu) -> MeasuredRun:
    """The run that a row of t4_runs.json holds."""
    model = row["model_id"]
    measured = row["measured"]
    return MeasuredRun(
        number=number,
        model=model,
        architecture_name=_SAME_ARCHITECTURE.get(model, model),
        recipe=_recipe(row["run"]),
        gpu=gpu,
        archive=row["source_file"].removesuffix(".json"),
        readings=Readings(
            **{reading: round(measured[key] * MIB) for reading, key in _KEYS.items()}
        ),
    )


def _recipe(run: Mapping[str, Any]) -> Recipe:
    """The recipe that a run's knobs stand for; alpha is twice the rank by default."""
    precision = _PRECISION[run["precision"]]
    double = "-double" if run["double_quant"] else ""
    return Recipe(
        method="lora",
        rank=run["lora_rank"],
        targets=tuple(run["lora_targets"]),
        dtype=precision,
        compute_dtype=precision,
        quantization=run["quantization"] + double,
        optimizer=run["optimizer"],
        batch_size=run["batch_size"],
        sequence_length=run["seq_len"],
        checkpointing="full" if run["grad_checkpoint"] else "none",
        attention=_ATTENTION[run["kernel"]],
    )


def _moment(moments: Mapping[str, Moment], label: str) -> Moment:
    if label not in moments:
        raise MemplanError(f"a footprint without the moment {label!r}")
    return moments[label]
