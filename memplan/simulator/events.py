"""The log of a traced fine-tune: what is allocated and released, in order.

An event is a pair of ints. (block, n >= 0) allocates n bytes; (block, FREE) releases;
(MARK, k) begins the moment `labels[k]`; (EMPTY_CACHE, 0) is torch.cuda.empty_cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FREE = -1
MARK = -1
EMPTY_CACHE = -2

CATEGORY_OF_PHASE = {
    "load": "weights",
    "adapt": "adapters",
    "resume": "optimizer",
    "optimizer": "optimizer",
    "merge": "weights",
}
"""What a block is for when nothing better is known; activations in other phases."""


@dataclass(slots=True)
class EventLog:
    """Events, and for each block what it is for and who asked for it."""

    events: list[tuple[int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    """By block: one of memplan.footprint.CATEGORIES."""
    operators: list[str] = field(default_factory=list)
    """By block: the operator that allocated it."""
    modules: list[str] = field(default_factory=list)
    """By block: the path of the module whose forward or backward it belongs to."""
    sizes: list[int] = field(default_factory=list)
    """By block: bytes as asked for, unrounded."""
    phase: str = "load"

    def begin(self, label: str) -> None:
        """Starts the moment of that label, such as `1.forward`."""
        self.phase = label.rpartition(".")[2]
        self.events.append((MARK, len(self.labels)))
        self.labels.append(label)

    def allocate(
        self, num_bytes: int, operator: str, module: str = "", category: str = ""
    ) -> int:
        """The block that the bytes are held in."""
        block = len(self.sizes)
        self.sizes.append(num_bytes)
        self.operators.append(operator)
        self.modules.append(module)
        self.categories.append(
            category or CATEGORY_OF_PHASE.get(self.phase, "activations")
        )
        self.events.append((block, num_bytes))
        return block

    def free(self, block: int) -> None:
        self.events.append((block, FREE))

    def empty_cache(self) -> None:
        self.events.append((EMPTY_CACHE, 0))
