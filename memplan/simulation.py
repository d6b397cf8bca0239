"""`Simulation`: a simulated fine-tune and what lay in memory at its peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from memplan.footprint import Footprint, Moment


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveBlock:
    """A block that was live at a peak."""

    num_bytes: int
    """Bytes handed out, rounded as the allocator does."""
    category: str
    """One of memplan.footprint.CATEGORIES."""
    operator: str
    """The operator that allocated it."""
    module: str
    """The path of the module that it belongs to; empty outside of modules."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Memory after an event of a fine-tune's life."""

    index: int
    """The event's number, from 0."""
    moment: str
    allocated_bytes: int
    reserved_bytes: int
    operator: str
    """What asked for the block that was allocated or released."""
    module: str
    """The path of the module that the block belongs to; empty outside of modules."""
    category: str = ""
    """What the block is for, one of CATEGORIES; empty where none came or went."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """A simulated fine-tune: its footprint, and what lay in memory at the peak."""

    footprint: Footprint
    total_parameters: int
    trainable_parameters: int
    peak_blocks: tuple[LiveBlock, ...]
    """Blocks live at the peak; the last is the one whose allocation reached it."""
    host: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Bytes of a process on the host, such as `load_bytes`, by moment."""

    @property
    def parameters(self) -> dict[str, int]:
        return {
            "total": self.total_parameters,
            "trainable": self.trainable_parameters,
        }

    def largest(self, count: int) -> list[LiveBlock]:
        """The largest blocks that were live at the peak."""
        return sorted(self.peak_blocks, key=lambda block: -block.num_bytes)[:count]

    def to_json(self) -> dict[str, Any]:
        """The simulation as it is kept for the next time."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Simulation:
        """The simulation that `to_json` wrote."""
        footprint = data["footprint"]
        moments = tuple(Moment(**moment) for moment in footprint["moments"])
        notes = tuple(footprint["notes"])
        blocks = tuple(LiveBlock(**block) for block in data["peak_blocks"])
        changed = {"moments": moments, "notes": notes}
        return cls(
            footprint=Footprint(**footprint | changed),
            total_parameters=data["total_parameters"],
            trainable_parameters=data["trainable_parameters"],
            peak_blocks=blocks,
            host=data["host"],
        )
