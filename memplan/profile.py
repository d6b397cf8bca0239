"""`Profile`: one measured run: what ran, where and with what, and what was read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memplan.errors import InputError
from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.recipe import Recipe

SCHEMA = 1
"""The version of a record's schema."""

KIND = "profile"

DEVICES = ("cuda", "cpu")
"""What was measured: torch's CUDA allocator, or the storages of tensors on a CPU."""

OUTCOMES = ("ok", "out-of-memory", "interrupted", "timed-out", "killed", "failed")
"""How a run ended; whatever it had finished is in the record in any case."""

COUNTERS = (
    "requested_bytes",
    "active_bytes",
    "inactive_split_bytes",
    "reserved_end_bytes",
    "retries",
    "resident_bytes",
    "resident_end_bytes",
    "microseconds",
)
"""What may have been read of a moment besides: the peaks of the allocator's other
statistics, what is reserved and resident when the moment is over, what it took."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """One measured run.

    A reading of 0 bytes was not taken: sources tell some of them and not others.
    `measure` makes one; `from_json(run.to_json())` gives it again.
    """

    id: str
    """The run's name, and that of its file."""
    source: str
    """Who measured: `memplan profile`, `memplan callback`, or a public archive."""
    device: str
    """One of DEVICES; records of the two are never compared with each other."""
    model: str
    recipe: Recipe
    footprint: Footprint | None
    """What was read; None where not even the load was finished."""
    config: Mapping[str, Any] | None = None
    """The model's config, where the catalog has none of that name."""
    gpu: Gpu | None = None
    """The card, with its measured context where there is one; None on a CPU."""
    outcome: str = "ok"
    """One of OUTCOMES."""
    message: str = ""
    """What the run died of, in its own words."""
    counters: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    """By moment: further readings, named as in COUNTERS."""
    segments: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Of the allocator's snapshot after the last step: counts and bytes."""
    driver: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What the driver said after the last step: bytes of the process and the card."""
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    step_seconds: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Versions of packages, of Python, CUDA and the driver; allocator settings."""
    seed: int = 0
    inference: Inference | None = None
    """The answers that were made in the place of training, if any were."""
    answer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What came of saving what was tuned, loading it anew and asking it for tokens;
    empty where that was not asked for."""
    weights: str = "random"
    """`random`, or `checkpoint` where from_pretrained loaded them."""
    measured_at: str = ""
    """When, as ISO 8601 in UTC."""
    trace: str = ""
    """The file of the allocator's event history, where it was kept."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_one_of("device", self.device, DEVICES)
        _check_one_of("outcome", self.outcome, OUTCOMES)

    @property
    def card(self) -> str:
        """Where it ran: the card's name, or `CPU`."""
        return "CPU" if self.gpu is None else self.gpu.name

    @property
    def has_measured(self) -> bool:
        """Whether steps were run to the end, so that peaks may be compared."""
        return self.outcome == "ok" and self.footprint is not None

    def to_json(self) -> dict[str, Any]:
        """The record as its file holds it; bytes are integers."""
        footprint = self.footprint
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "id": self.id,
            "source": self.source,
            "measured_at": self.measured_at,
            "device": self.device,
            "model": self.model,
            "config": None if self.config is None else dict(self.config),
            "recipe": self.recipe.to_json(),
            "gpu": None if self.gpu is None else self.gpu.to_json(),
            "outcome": {"status": self.outcome, "message": self.message},
            "footprint": None if footprint is None else _footprint_json(footprint),
            "counters": {name: dict(of) for name, of in self.counters.items()},
            "segments": dict(self.segments),
            "driver": dict(self.driver),
            "parameters": dict(self.parameters),
            "step_seconds": list(self.step_seconds),
            "losses": list(self.losses),
            "environment": dict(self.environment),
            "seed": self.seed,
            "inference": None if self.inference is None else self.inference.to_json(),
            "answer": dict(self.answer),
            "weights": self.weights,
            "trace": self.trace,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], file: str = "") -> Profile:
        """The record that `to_json` wrote; raises InputError for any other object."""
        if not isinstance(data, Mapping) or data.get("kind") != KIND:
            raise InputError(
                "run", file, "is not a measured run", "see `memplan schema profile`"
            )
        if data.get("schema") != SCHEMA:
            raise InputError(
                "run",
                file,
                f"is of schema {data.get('schema')}, not {SCHEMA}",
                "read it with the memplan that wrote it, or measure again",
            )
        try:
            return cls(**_fields(data))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            problem = f"is not a whole record ({type(error).__name__}: {error})"
            raise InputError("run", file, problem, "measure again") from error


def slug(text: str) -> str:
    """A name as the name of a file: lower case, dashes between words."""
    return re.sub(r"[^a-z0-9.]+", "-", text.casefold()).strip("-.") or "unnamed"


def _fields(data: Mapping[str, Any]) -> dict[str, Any]:
    footprint, gpu = data["footprint"], data["gpu"]
    # Records of before inference and answers were measured do not speak of them.
    inference = data.get("inference")
    return {
        **{key: data[key] for key in _PLAIN_KEYS},
        "recipe": Recipe.from_mapping(data["recipe"]),
        "footprint": None if footprint is None else _footprint(footprint),
        "gpu": None if gpu is None else _gpu(gpu),
        "answer": data.get("answer", {}),
        "inference": None if inference is None else Inference.from_json(inference),
        "outcome": data["outcome"]["status"],
        "message": data["outcome"]["message"],
        **{key: tuple(data[key]) for key in ("step_seconds", "losses", "notes")},
    }


_PLAIN_KEYS = (
    *("id", "source", "measured_at", "device", "model", "config", "counters"),
    *("segments", "driver", "parameters", "environment", "seed", "weights", "trace"),
)


def _footprint_json(footprint: Footprint) -> dict[str, Any]:
    return {
        "moments": [
            {
                "label": moment.label,
                "allocated_bytes": moment.allocated_bytes,
                "reserved_bytes": moment.reserved_bytes,
                "end_allocated_bytes": moment.end_allocated_bytes,
            }
            for moment in footprint.moments
        ],
        "context_bytes": footprint.context_bytes,
        "paged_bytes": footprint.paged_bytes,
        "failed_moment": footprint.failed_moment,
        "missing_bytes": footprint.missing_bytes,
    }


def _footprint(data: Mapping[str, Any]) -> Footprint:
    moments = tuple(Moment(**moment) for moment in data["moments"])
    return Footprint(**{**data, "moments": moments})


def _gpu(data: Mapping[str, Any]) -> Gpu:
    major, minor = data["compute_capability"].split(".")
    derived = ("budget_bytes", "compute_capability", "assumptions")
    kept = {key: value for key, value in data.items() if key not in derived}
    return Gpu(
        **kept,
        compute_capability=(int(major), int(minor)),
        assumptions=tuple(data["assumptions"]),
    )


def _check_one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InputError(field, value, "is unknown", f"use one of {', '.join(known)}")
