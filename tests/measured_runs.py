"""Measured runs made by hand."""

from __future__ import annotations

from typing import Any

from memplan.footprint import Footprint, Moment
from memplan.gpu import Gpu
from memplan.profile import Profile
from memplan.recipe import Recipe
from memplan.units import GIB, MIB

CARD = Gpu(
    name="NVIDIA Test Card",
    capacity_bytes=16 * GIB,
    context_bytes=300 * MIB,
    compute_capability=(8, 6),
)


def moment(label: str, allocated: int, reserved: int, end: int = 0) -> Moment:
    """A moment of so many MiB."""
    return Moment(
        label=label,
        allocated_bytes=allocated * MIB,
        reserved_bytes=reserved * MIB,
        end_allocated_bytes=end * MIB,
    )


def measured(name: str = "one", **changes: Any) -> Profile:
    """A run on a card; what is given replaces what it would be."""
    fields: dict[str, Any] = {
        "id": name,
        "source": "by hand",
        "device": "cuda",
        "model": "openai-community/gpt2",
        "recipe": Recipe(rank=4, sequence_length=64),
        "gpu": CARD,
        "footprint": Footprint(
            moments=(
                moment("load", 500, 600, 480),
                moment("adapt", 490, 600, 482),
                moment("2.forward", 700, 800, 690),
                moment("2.backward", 720, 820, 500),
                moment("2.optimizer", 510, 820, 490),
            ),
            context_bytes=CARD.context_bytes,
        ),
        "counters": {"2.forward": {"requested_bytes": 690 * MIB}},
        "environment": {"torch": "2.13.0"},
        "step_seconds": (0.5, 0.25),
        "losses": (3.0, 2.5),
    }
    return Profile(**fields | changes)
