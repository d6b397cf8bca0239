"""What torch's allocator did on a card, event by event, and the same by memplan's.

A history is a file of `profiles/traces`: lines of [action, address, bytes], as
torch.cuda.memory._snapshot has them. Blocks in segments that were there before the
history began are left out on both sides.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memplan.accuracy import Case
from memplan.addresses import Addresses
from memplan.allocator import Block, CachingAllocator
from memplan.store import profiles_path

TRACES = Path(__file__).parents[1] / "profiles" / "traces"

Event = tuple[str, int, int]


def files() -> list[Path]:
    """The histories that there are, by name; none where the folder was left out."""
    return sorted(TRACES.glob("*/*.jsonl.gz"))


def name_of(file: Path) -> str:
    """The run that a history is of."""
    return file.name.removesuffix(".jsonl.gz")


def run_file(file: Path) -> Path:
    """The record of that run."""
    return profiles_path() / "runs" / file.parent.name / f"{name_of(file)}.json"


def read(file: Path) -> list[Event]:
    """The events of a history."""
    with gzip.open(file, "rt", encoding="utf-8") as opened:
        return [tuple(json.loads(line)) for line in opened]


class _Recorded(Addresses):
    """Segments lie where the card had them."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved: list[tuple[int, int]] = []
        """The segments that the card reserved and the model has not yet."""

    def take(self, num_bytes: int) -> int:
        assert self.reserved, "the model reserves where the card did not"
        address, size = self.reserved.pop(0)
        assert size == num_bytes, f"a segment of {num_bytes} where the card took {size}"
        return address

    def give_back(self, address: int, num_bytes: int) -> None:
        """What is where, the card says."""


@dataclass(slots=True)
class _Ranges:
    """The segments of a history, by which a block is known to be in one."""

    starts: list[int] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)

    def add(self, address: int, size: int) -> None:
        insort(self.starts, address)
        self.sizes[address] = size

    def discard(self, address: int) -> None:
        if address in self.sizes:
            self.starts.remove(address)
            del self.sizes[address]

    def __contains__(self, address: int) -> bool:
        index = bisect_right(self.starts, address) - 1
        if index < 0:
            return False
        start = self.starts[index]
        return address < start + self.sizes[start]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay came to."""

    num_blocks: int
    """Blocks that lie where the card had them."""
    num_older: int
    """Blocks in older segments, left out."""
    peak_allocated_bytes: int
    peak_reserved_bytes: int


def replay_on_its_segments(events: Sequence[Event], case: Case) -> Replayed:
    """Every block and every segment of a history, compared by address and size.

    The model is told where the card put a segment, and nothing else. Raises
    AssertionError at the first difference.
    """
    addresses = _Recorded()
    allocator = allocator_of(case, addresses)
    known, live, num_blocks, num_older = _Ranges(), {}, 0, 0
    previous = ""
    for action, address, size in events:
        if action == "segment_alloc":
            addresses.reserved.append((address, size))
            known.add(address, size)
        elif action == "alloc":
            if address not in known:
                num_older += 1
                continue
            block = allocator.malloc(size)
            assert block is not None
            assert not addresses.reserved, "the card reserves where the model does not"
            assert block.address == address, f"a block of {size} lies elsewhere"
            live[address] = block
            num_blocks += 1
        elif action == "free_completed":
            allocator.free(live.pop(address, None))
        elif action == "segment_free":
            if previous != "segment_free":
                allocator.empty_cache()
            known.discard(address)
        previous = action
    return Replayed(
        num_blocks,
        num_older,
        allocator.peak_allocated_bytes,
        allocator.peak_reserved_bytes,
    )


def allocator_of(case: Case, addresses: Addresses | None = None) -> CachingAllocator:
    """The model's allocator on the card of a run, under its settings."""
    assert case.gpu is not None
    return CachingAllocator(
        case.settings, device_bytes=case.gpu.capacity_bytes, addresses=addresses
    )


def replay(
    events: Sequence[Event], allocator: CachingAllocator
) -> dict[int, Block | None]:
    """Makes the requests of a history; what is held at its end, by its addresses."""
    live: dict[int, Block | None] = {}
    for _ in advance(events, allocator, live):
        pass
    return live


def advance(
    events: Sequence[Event], allocator: CachingAllocator, live: dict[int, Block | None]
) -> Iterator[tuple[int, Event]]:
    """Makes the requests of a history one after the other, telling each beforehand."""
    previous = ""
    for number, event in enumerate(events):
        yield number, event
        action, address, size = event
        if action == "alloc":
            live[address] = allocator.malloc(size)
        elif action == "free_completed":
            allocator.free(live.pop(address, None))
        elif action in _RETURNS and previous not in _RETURNS:
            allocator.empty_cache()
        previous = action


_RETURNS = ("segment_free", "segment_unmap")
