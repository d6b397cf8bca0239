"""`Plan`: a decision, and what it stands on.

A plan's file is what `memplan plan --json` prints, and a recipe file at once: its
`recipe` and `model` are read wherever a recipe is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memplan.errors import InputError
from memplan.footprint import OUTSIDE_TORCH, Footprint, Moment
from memplan.gpu import Gpu
from memplan.recipe import Recipe

HASH_DIGITS = 16
"""Hexadecimal digits of a plan's hash: enough to tell plans apart, short to read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A recipe that was looked at and not taken."""

    changes: Mapping[str, Any]
    """The recipe's keys in which it differs from the plan's."""
    reason: str
    missing_bytes: int = 0
    """Bytes that the card lacks for it; 0 where it fits."""

    def to_json(self) -> dict[str, Any]:
        return {
            "changes": dict(self.changes),
            "reason": self.reason,
            "missing_bytes": self.missing_bytes,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Rejected:
        return cls(**{name: data[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A recipe that fits a card, how it was chosen, and what was proven of it.

    `solve` makes one; its file is what `to_json` gives, and is a recipe file, too.
    """

    model: str
    recipe: Recipe
    gpu: Gpu
    footprint: Footprint
    parameters: Mapping[str, int]
    """`total` and `trainable`."""
    verified_by: str
    """`simulation`, or `estimate` where none was run."""
    prefer: str
    """What was aimed at once it fits: quality, speed or length."""
    prior: str
    """What said how much a rank is worth."""
    tier: str
    """What that stands on: T0 nothing, T1 weights, T2 data."""
    solution: Mapping[str, Any] = field(default_factory=dict)
    """Solver, status, objective, dual bound, gap and price."""
    regrets: Mapping[str, float] = field(default_factory=dict)
    """What each prior forgoes, as a share of what the budget can gain."""
    reasons: tuple[str, ...] = ()
    """One sentence a decision."""
    alternatives: tuple[Mapping[str, Any], ...] = ()
    """Other recipes that nothing beats in memory, length, capacity and speed."""
    rejected: tuple[Rejected, ...] = ()
    lengths: Mapping[str, Any] = field(default_factory=dict)
    """How long the samples are and what batches they make, where that was told."""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def budget_bytes(self) -> int:
        """What torch's allocator may reserve."""
        return self.gpu.budget_bytes

    @property
    def hash(self) -> str:
        """What tells the decision apart: the model, the recipe and the card."""
        return decision_hash(self.model, self.recipe, self.gpu.to_json())

    def _repr_html_(self) -> str:
        """What to run, what it takes and why, as a notebook shows it."""
        from memplan import notebook

        asked = self.recipe.to_json()
        rows = [
            (key, f"{value}")
            for key, value in asked.items()
            if value not in (None, {}, [])
        ]
        return (
            notebook.paragraph(f"{self.model} on {self.gpu.name}", strong=True)
            + self.footprint._repr_html_()
            + notebook.table(("key", "value"), rows)
            + "".join(map(notebook.paragraph, self.reasons))
        )

    def to_json(self) -> dict[str, Any]:
        """The plan's file: the keys of every footprint, and `plan`."""
        return {
            "schema": 1,
            "kind": "plan",
            "model": self.model,
            "recipe": self.recipe.to_json(),
            "gpu": self.gpu.to_json(),
            **self.footprint.to_json(),
            "parameters": dict(self.parameters),
            **({"lengths": dict(self.lengths)} if self.lengths else {}),
            "plan": {
                "hash": self.hash,
                "budget_bytes": self.budget_bytes,
                "margin_bytes": self.footprint.margin_bytes,
                "verified_by": self.verified_by,
                "prefer": self.prefer,
                "prior": self.prior,
                "tier": self.tier,
                "solution": dict(self.solution),
                "regrets": dict(self.regrets),
                "reasons": list(self.reasons),
                "alternatives": [dict(one) for one in self.alternatives],
                "rejected": [one.to_json() for one in self.rejected],
            },
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` wrote; raises InputError for anything else."""
        try:
            decided = data["plan"]
            gpu = Gpu.from_json(data["gpu"])
            return cls(
                model=data["model"],
                recipe=Recipe.from_mapping(data["recipe"]),
                gpu=gpu,
                footprint=_footprint(data, gpu),
                parameters=data["parameters"],
                verified_by=decided["verified_by"],
                prefer=decided["prefer"],
                prior=decided["prior"],
                tier=decided["tier"],
                solution=decided["solution"],
                regrets=decided["regrets"],
                reasons=tuple(decided["reasons"]),
                alternatives=tuple(decided["alternatives"]),
                rejected=tuple(map(Rejected.from_json, decided["rejected"])),
                lengths=data.get("lengths") or {},
                notes=tuple(data["notes"]),
                versions=data["versions"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                "plan", data, f"is no plan ({error})", "give what `memplan plan` wrote"
            ) from error


def decision_hash(model: str, recipe: Recipe, gpu: Mapping[str, Any] | None) -> str:
    """The hash of a decision, the card as JSON; the same on every machine."""
    decided = {"model": model, "recipe": recipe.to_json(), "gpu": gpu}
    text = json.dumps(decided, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def _footprint(data: Mapping[str, Any], gpu: Gpu) -> Footprint:
    """The footprint as far as the file holds it: the peak's breakdown, and no other."""
    peak = data["peak"]["moment"]
    parts = {
        name: count
        for name, count in data["breakdown"].items()
        if name not in (*OUTSIDE_TORCH, "cache")
    }
    moments = tuple(
        Moment(
            label=one["label"],
            allocated_bytes=one["allocated_bytes"],
            reserved_bytes=one["reserved_bytes"],
            breakdown=parts if one["label"] == peak else {},
        )
        for one in data["moments"]
    )
    return Footprint(
        moments=moments,
        context_bytes=gpu.context_bytes,
        paged_bytes=data["breakdown"]["paged"],
        capacity_bytes=gpu.budget_bytes + gpu.context_bytes,
    )
