"""PyTorch's CUDA caching allocator: the same blocks, segments and statistics, no GPU.

The rules are those of torch 2.13, `c10/cuda/CUDACachingAllocator.cpp` (the functions
named in the comments below) and `c10/core/AllocatorConfig.cpp`.

Notable:
* A request rounds up to 512 B. Up to 1 MiB it comes from the small pool (segments of
  2 MiB), above from the large one (segments of 20 MiB; from 10 MiB on, the request
  rounded up to 2 MiB).
* The best fit is the smallest cached block of the request's stream; among equal sizes
  the lowest address. So addresses matter, which moves what is reserved by whole score
  matrices (memplan.addresses).
* A large block is split only for a remainder above 1 MiB. Otherwise it is handed out
  whole, and `allocated_bytes` counts all of it.
* Nothing returns to the driver until an allocation fails or `empty_cache` is called,
  and then only segments that are one free block (or free pages, if expandable).

Left out: CUDA graphs and private pools, blocks recorded on a second stream, and the
driver's own rounding.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from memplan.addresses import Addresses
from memplan.errors import InputError, UnknownNameError
from memplan.units import MIB, format_bytes, round_up

MIN_BLOCK_BYTES = 512
"""Every request rounds up to a multiple of it (AllocatorConfig.h, kMinBlockSize)."""

SMALL_LIMIT_BYTES = 1 * MIB
"""The largest request of the small pool (AllocatorConfig.h, kSmallSize)."""

SMALL_SEGMENT_BYTES = 2 * MIB
"""A segment, or page, of the small pool (AllocatorConfig.h, kSmallBuffer)."""

LARGE_SEGMENT_BYTES = 20 * MIB
"""The default of `large_segment_size_mb` (AllocatorConfig.h, large_segment_size_)."""

MIN_LARGE_BYTES = 10 * MIB
"""Requests from here on get a segment of their own size (kMinLargeAlloc)."""

LARGE_ROUNDING_BYTES = 2 * MIB
"""What the size of such a segment is a multiple of (kRoundLarge)."""

NUM_ROUNDUP_INTERVALS = 16
"""Powers of two from 1 MiB to 64 GiB that have their own `roundup_power2_divisions`
(AllocatorConfig.cpp, kRoundUpPowerOfTwoIntervals)."""

UNLIMITED_BYTES = 2**64 - 1
"""The largest size_t: torch's default `max_split_size`, and no capacity here."""

UNKNOWN_DEVICE_BYTES = 2**40
"""The card that expandable segments reserve addresses for when none is named; more
than any card holds, so that no segment's addresses run out."""

_ADDRESS_BITS = 64


class OutOfMemory(Exception):  # noqa: N818 - named for torch.OutOfMemoryError
    """An allocation that fails even after the cache has been given back.

    Attributes are bytes; `capacity_bytes` is what the process may reserve.
    """

    def __init__(
        self,
        requested_bytes: int,
        allocated_bytes: int,
        reserved_bytes: int,
        capacity_bytes: int,
    ) -> None:
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.capacity_bytes = capacity_bytes
        super().__init__(
            f"tried to allocate {format_bytes(requested_bytes)} with"
            f" {format_bytes(allocated_bytes)} allocated and"
            f" {format_bytes(reserved_bytes)} reserved"
            f" of {format_bytes(capacity_bytes)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorSettings:
    """What PYTORCH_CUDA_ALLOC_CONF (or PYTORCH_ALLOC_CONF) says that changes memory.

    Raises InputError, field "allocator", for values that torch refuses.
    """

    max_split_size_bytes: int | None = None
    """Blocks of this size and above are never split; None: all may be."""

    max_non_split_rounding_bytes: int | None = None
    """How much larger than the request an unsplittable block may be; None, torch's
    default: `large_segment_size_bytes`."""

    large_segment_size_bytes: int = LARGE_SEGMENT_BYTES
    """The segment for requests above 1 MiB and below 10 MiB, and the page of an
    expandable segment for large blocks."""

    roundup_power2_divisions: int | tuple[tuple[int | None, int], ...] = 0
    """Steps between powers of two that requests round up to: one number for all sizes
    (0: none), or pairs of (power of two in MiB, steps), None being the rest (`>`)."""

    garbage_collection_threshold: float = 0.0
    """The share of the allowed memory above which old cached segments are returned; no
    effect (in torch neither) unless `per_process_memory_fraction` is below 1."""

    per_process_memory_fraction: float = 1.0
    """The share of the card that the process may reserve."""

    expandable_segments: bool = False
    """One growing segment for each stream and pool, in pages, in place of many."""

    throw_on_cudamalloc_oom: bool = False
    """Give up, without returning the cache, on a request beyond the whole card."""

    on_windows: bool = False
    """Whether torch runs on Windows, where it has no expandable segments
    (AllocatorConfig.cpp, PYTORCH_C10_DRIVER_API_SUPPORTED). Said by the system, not in
    the variable."""

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_shares(self)
        _check_divisions(self.roundup_power2_divisions)

    @classmethod
    def parse(cls, text: str, *, on_windows: bool = False) -> AllocatorSettings:
        """The settings in an environment variable's value, `key:value,key:value`.

        Keys that change no memory are accepted. Raises UnknownNameError for other
        unknown keys and InputError for bad values.
        """
        values = _split_entries(text)
        _check_backend(values.get("backend", "native"))
        large_segment = _mebibytes(values, _SEGMENT)
        return cls(
            max_split_size_bytes=_mebibytes(values, "max_split_size_mb"),
            max_non_split_rounding_bytes=_mebibytes(
                values, "max_non_split_rounding_mb"
            ),
            large_segment_size_bytes=(
                LARGE_SEGMENT_BYTES if large_segment is None else large_segment
            ),
            roundup_power2_divisions=_divisions(values),
            garbage_collection_threshold=_share(values, _COLLECTION, 0.0),
            per_process_memory_fraction=_share(values, _FRACTION, 1.0),
            expandable_segments=_flag(values, "expandable_segments"),
            throw_on_cudamalloc_oom=_flag(values, "throw_on_cudamalloc_oom"),
            on_windows=on_windows,
        )

    @property
    def expands(self) -> bool:
        """Whether segments are expandable."""
        return self.expandable_segments and not self.on_windows

    def to_text(self) -> str:
        """The settings that differ from torch's defaults, as `parse` reads them."""
        given = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name != "on_windows" and getattr(self, field.name) != field.default
        ]
        return ",".join(_entry(name, value) for name, value in given)

    @property
    def rounds_to_powers(self) -> bool:
        """Whether any size rounds up to a step between powers of two."""
        return max(self.divisions_by_interval()) > 1

    def divisions_by_interval(self) -> tuple[int, ...]:
        """Steps between 2^i MiB and 2^(i+1) MiB, for each interval i.

        As AllocatorConfig.cpp, parseRoundUpPower2Divisions: the first pair also counts
        for all smaller sizes, `>` for all after the last pair, a gap means no rounding.
        """
        if isinstance(self.roundup_power2_divisions, int):
            return (self.roundup_power2_divisions,) * NUM_ROUNDUP_INTERVALS
        steps = [0] * NUM_ROUNDUP_INTERVALS
        last = None
        for mebibytes, divisions in self.roundup_power2_divisions:
            if mebibytes is None:
                first = 1 if last is None else last + 1
                steps[first:] = [divisions] * (NUM_ROUNDUP_INTERVALS - first)
                continue
            index = min(mebibytes.bit_length() - 1, NUM_ROUNDUP_INTERVALS - 1)
            if last is None:
                steps[:index] = [divisions] * index
            steps[index] = divisions
            last = index
        return tuple(steps)


def environment_variable(torch_version: str) -> str:
    """The name of the variable that a torch of that version reads the settings from.

    From 2.13 on CUDA's allocator reads two names, CUDA's own first; before, the other
    one is unknown or does not reach expandable_segments (CUDAAllocatorConfig.h,
    pytorch#183387).
    """
    major, minor = re.findall("[0-9]+", torch_version)[:2]
    if (int(major), int(minor)) < FIRST_WITH_NEW_NAME:
        return "PYTORCH_CUDA_ALLOC_CONF"
    return "PYTORCH_ALLOC_CONF"


FIRST_WITH_NEW_NAME = (2, 13)
"""The first torch whose source was seen to read all keys under the new name."""

_COLLECTION = "garbage_collection_threshold"
_DIVISIONS = "roundup_power2_divisions"
_DIVISIONS_REMEDY = "write 4, or [256:1,512:2,1024:4,>:8]"
_FRACTION = "per_process_memory_fraction"
_SEGMENT = "large_segment_size_mb"

_MEMORY_KEYS = (
    "backend",
    "expandable_segments",
    _COLLECTION,
    _SEGMENT,
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    _FRACTION,
    _DIVISIONS,
    "throw_on_cudamalloc_oom",
)

_KEYS_WITHOUT_EFFECT = (
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "pinned_use_hip_host_register",
    "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc",
)
"""Keys of host memory, locks and CUDA graphs (AllocatorConfig.cpp, getMutableKeys, and
CUDAAllocatorConfig.h, getKeys)."""

_ENTRY = re.compile(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)(?:,|$)")
_PAIR = re.compile(r"(>|[0-9]+):([0-9]+)")


def _bad(key: str, value: object, problem: str, remedy: str) -> InputError:
    return InputError("allocator", f"{key}:{value}", problem, remedy)


def _split_entries(text: str) -> dict[str, str]:
    """Keys and values of `key:value,key:[value,value]`; spaces do not count."""
    text = "".join(text.split())
    values: dict[str, str] = {}
    position = 0
    while position < len(text):
        entry = _ENTRY.match(text, position)
        if entry is None:
            raise InputError(
                "allocator",
                text[position:],
                "is not a list of key:value",
                "write it like expandable_segments:True,max_split_size_mb:512",
            )
        key, value = entry.groups()
        if key not in _MEMORY_KEYS and key not in _KEYS_WITHOUT_EFFECT:
            raise UnknownNameError(
                "allocator", key, (*_MEMORY_KEYS, *_KEYS_WITHOUT_EFFECT)
            )
        values[key] = value
        position = entry.end()
    return values


def _check_backend(backend: str) -> None:
    if backend == "cudaMallocAsync":
        problem = "leaves the caching to the driver, whose rules are not published"
        raise _bad("backend", backend, problem, "use backend:native, the default")
    if backend != "native":
        raise _bad("backend", backend, "is no allocator", "use backend:native")


def _entry(name: str, value: int | float | tuple[tuple[int | None, int], ...]) -> str:
    """One `key:value`, sizes in MiB."""
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')}_mb:{int(value) // MIB}"  # type: ignore[arg-type]
    if isinstance(value, tuple):
        steps = ",".join(
            f"{'>' if size is None else size}:{count}" for size, count in value
        )
        return f"{name}:[{steps}]"
    return f"{name}:{value}"


def _mebibytes(values: Mapping[str, str], key: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not re.fullmatch("[0-9]{1,12}", value):
        raise _bad(key, value, "is no whole number", "give the size in MiB")
    return int(value) * MIB


def _share(values: Mapping[str, str], key: str, default: float) -> float:
    value = values.get(key)
    if value is None:
        return default
    if not re.fullmatch(r"[0-9]*\.?[0-9]+(e-?[0-9]{1,2})?", value):
        raise _bad(key, value, "is no number", "write it like 0.8")
    if key == _COLLECTION and float(value) == 0:
        raise _bad(key, value, "would collect always", "leave it out to collect never")
    return float(value)


def _flag(values: Mapping[str, str], key: str) -> bool:
    value = values.get(key, "False")
    if value not in ("True", "False"):
        raise _bad(key, value, "is no flag", "write True or False")
    return value == "True"


def _divisions(values: Mapping[str, str]) -> int | tuple[tuple[int | None, int], ...]:
    value = values.get(_DIVISIONS)
    if value is None:
        return 0
    if re.fullmatch("[1-9][0-9]*", value):
        return int(value)
    pairs = [_PAIR.fullmatch(pair) for pair in value.strip("[]").split(",")]
    known = [pair.groups() for pair in pairs if pair is not None]
    if not value.startswith("[") or len(known) < len(pairs):
        raise _bad(_DIVISIONS, value, "is no number or list", _DIVISIONS_REMEDY)
    return tuple(
        (None if start == ">" else int(start), int(steps)) for start, steps in known
    )


def _check_sizes(settings: AllocatorSettings) -> None:
    """As parseLargeSegmentSize, parseMaxSplitSize, parseMaxNonSplitRoundingSize."""
    segment = settings.large_segment_size_bytes
    if segment <= MIN_LARGE_BYTES:
        raise _bad(_SEGMENT, segment // MIB, "is too small", "give more than 10")
    # cuMemCreate takes whole pages of the GPU only, which are 2 MiB.
    if settings.expands and segment % SMALL_SEGMENT_BYTES:
        problem = "is odd, which expandable segments cannot be"
        raise _bad(_SEGMENT, segment // MIB, problem, "give an even number")
    for key, size in (
        ("max_split_size_mb", settings.max_split_size_bytes),
        ("max_non_split_rounding_mb", settings.max_non_split_rounding_bytes),
    ):
        if size is not None and size < segment:
            remedy = f"give at least {_SEGMENT}, which is {segment // MIB}"
            raise _bad(key, size // MIB, "is too small", remedy)


def _check_shares(settings: AllocatorSettings) -> None:
    """As parseGarbageCollectionThreshold and parsePerProcessMemoryFraction."""
    threshold = settings.garbage_collection_threshold
    if not 0 <= threshold < 1:
        raise _bad(_COLLECTION, threshold, "is not below 1", "write it like 0.8")
    fraction = settings.per_process_memory_fraction
    if not 0 <= fraction <= 1:
        raise _bad(_FRACTION, fraction, "is not from 0 to 1", "write it like 0.8")


def _check_divisions(divisions: int | tuple[tuple[int | None, int], ...]) -> None:
    """As parseRoundUpPower2Divisions: powers of two, or 0 for no rounding."""
    if isinstance(divisions, int):
        numbers = [divisions or 1]
    else:
        starts = [1 if start is None else start for start, _ in divisions]
        numbers = [*starts, *(steps or 1 for _, steps in divisions)]
    for number in numbers:
        if number < 1 or number & (number - 1):
            raise _bad(_DIVISIONS, number, "is no power of two", _DIVISIONS_REMEDY)


class Block:
    """A piece of a segment, and the handle that `malloc` returns and `free` takes.

    Sizes and addresses are bytes. Blocks of one segment are linked in address order.
    """

    __slots__ = (
        "address",
        "allocated",
        "cached_at",
        "mapped",
        "next",
        "pool",
        "previous",
        "requested_bytes",
        "size_bytes",
    )

    def __init__(self, pool: _Pool, address: int, size_bytes: int) -> None:
        self.pool = pool
        self.address = address
        self.size_bytes = size_bytes
        self.requested_bytes = 0
        self.allocated = False
        self.mapped = True
        self.cached_at = 0
        self.previous: Block | None = None
        self.next: Block | None = None

    def __repr__(self) -> str:
        state = "allocated" if self.allocated else "free" if self.mapped else "unmapped"
        return f"<Block {self.size_bytes} B at {self.address:#x}, {state}>"

    @property
    def stream(self) -> int:
        """The stream that the block belongs to."""
        return self.pool.stream

    @property
    def is_split(self) -> bool:
        """Whether the block is only a part of its segment."""
        return self.previous is not None or self.next is not None

    @property
    def reach_bytes(self) -> int:
        """What the block can grow to by mapping the addresses after it."""
        after = self.next
        if after is None or after.mapped:
            return self.size_bytes
        return self.size_bytes + after.size_bytes

    def split(self, size_bytes: int) -> Block:
        """Shrinks the block to a size and returns the rest, which follows it."""
        rest = Block(self.pool, self.address + size_bytes, self.size_bytes - size_bytes)
        self.size_bytes = size_bytes
        rest.previous = self
        after = rest.next = self.next
        if after is not None:
            after.previous = rest
        self.next = rest
        return rest

    def absorb_next(self) -> None:
        """Takes over the block that follows, whose object is dead from then on."""
        absorbed = self.next
        assert absorbed is not None
        self.size_bytes += absorbed.size_bytes
        after = self.next = absorbed.next
        if after is not None:
            after.previous = self


@dataclass(frozen=True, slots=True)
class SegmentBlock:
    """One block of a segment, named as in torch.cuda.memory_snapshot, in bytes."""

    address: int
    size: int
    requested_size: int
    state: str
    """`active_allocated` or `inactive`."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A range of reserved memory, named as in torch.cuda.memory_snapshot.

    An expandable segment is one record for each contiguous mapped range.
    """

    address: int
    total_size: int
    allocated_size: int
    requested_size: int
    stream: int
    segment_type: str
    """`small` or `large`."""
    is_expandable: bool
    blocks: tuple[SegmentBlock, ...]


class CachingAllocator:
    """The allocator of one process on one card, in the order of the calls made to it.

    `capacity_bytes` is what the driver gives this process before it refuses (None: no
    limit). `device_bytes` is the card's whole memory (totalGlobalMem), which
    `per_process_memory_fraction` and `throw_on_cudamalloc_oom` are relative to.
    `addresses` is where the driver places segments (None: as it was measured to).
    Raises InputError if settings need `device_bytes` and it is None.
    """

    def __init__(
        self,
        settings: AllocatorSettings | None = None,
        capacity_bytes: int | None = None,
        *,
        device_bytes: int | None = None,
        addresses: Addresses | None = None,
    ) -> None:
        self.settings = settings = settings or AllocatorSettings()
        self._addresses = addresses or Addresses()
        self._capacity_bytes = (
            UNLIMITED_BYTES if capacity_bytes is None else capacity_bytes
        )
        self._device_bytes = device_bytes or UNKNOWN_DEVICE_BYTES
        self._allowed_bytes = _allowed_bytes(settings, device_bytes)
        self._rejecting = settings.throw_on_cudamalloc_oom
        self._expandable = settings.expands
        self._max_split_bytes = settings.max_split_size_bytes or UNLIMITED_BYTES
        self._rounding_bytes = (
            settings.max_non_split_rounding_bytes or settings.large_segment_size_bytes
        )
        self._divisions = settings.divisions_by_interval()
        self._rounds_to_powers = settings.rounds_to_powers
        # garbage_collect_cached_blocks runs only where a fraction limits the process.
        self._collecting = (
            self._allowed_bytes < UNLIMITED_BYTES
            and settings.garbage_collection_threshold > 0
        )
        self._heads: dict[int, Block] = {}
        self._all = _PoolStatistics()
        large_bytes = settings.large_segment_size_bytes
        self._small = _SizeClass("small", SMALL_SEGMENT_BYTES, self._all)
        self._large = _SizeClass("large", large_bytes, self._all)
        self._oversize_allocations = _Statistic()
        self._oversize_segments = _Statistic()
        self.num_alloc_retries = 0
        self.num_ooms = 0
        self.num_oom_rejections = 0
        self.num_sync_all_streams = 0
        self.num_device_alloc = 0
        self.num_device_free = 0

    @property
    def allocated_bytes(self) -> int:
        """torch.cuda.memory_allocated."""
        return self._all.allocated_bytes.current

    @property
    def reserved_bytes(self) -> int:
        """torch.cuda.memory_reserved."""
        return self._all.reserved_bytes.current

    @property
    def requested_bytes(self) -> int:
        """What the live blocks were asked for, before any rounding."""
        return self._all.requested_bytes.current

    @property
    def peak_allocated_bytes(self) -> int:
        """torch.cuda.max_memory_allocated."""
        return self._all.allocated_bytes.peak

    @property
    def peak_reserved_bytes(self) -> int:
        """torch.cuda.max_memory_reserved."""
        return self._all.reserved_bytes.peak

    @property
    def peak_requested_bytes(self) -> int:
        """The most that live blocks were asked for at once."""
        return self._all.requested_bytes.peak

    def malloc(self, num_bytes: int, stream: int = 0) -> Block | None:
        """A block of at least the given size; None for no bytes, like a null pointer.

        Raises OutOfMemory, and ValueError for a negative size.
        """
        if num_bytes <= 0:
            if num_bytes == 0:
                return None
            raise ValueError(f"cannot allocate {num_bytes} bytes")
        if self._rounds_to_powers:
            size = self._rounded_to_powers(num_bytes)
        else:
            size = (num_bytes + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES
        size_class = self._small if size <= SMALL_LIMIT_BYTES else self._large
        pool = size_class.pools.get(stream) or size_class.add_pool(stream)
        block = self._take_cached(pool, size) or self._take_new(pool, size, num_bytes)
        self._hand_out(block, size, num_bytes)
        return block

    def free(self, block: Block | None) -> None:
        """Returns a block to its pool, merged with its free neighbours (free_block).

        Raises ValueError for a block that is not allocated.
        """
        if block is None:
            return
        if not block.allocated:
            raise ValueError(f"{block} was freed before")
        block.allocated = False
        pool = block.pool
        size_bytes = block.size_bytes
        requested_bytes = block.requested_bytes
        split_count, split_bytes = self._cache(block)
        for statistics in pool.statistics:
            statistics.count_free(size_bytes, requested_bytes)
            if split_count or split_bytes:
                statistics.change_inactive_split(split_count, split_bytes)
        if size_bytes >= self._max_split_bytes:
            self._oversize_allocations.decrease(1)

    def empty_cache(self) -> None:
        """Returns every wholly free segment or page (release_cached_blocks)."""
        self.num_sync_all_streams += 1
        for size_class in (self._large, self._small):
            for pool in size_class.in_stream_order():
                cached = list(pool.blocks)
                for block in cached:
                    if self._expandable:
                        self._unmap_pages(block)
                    elif not block.is_split:
                        self._release(block)

    def reset_peak_stats(self) -> None:
        """Sets every peak to its current value, as reset_peak_memory_stats does."""
        for statistics in (self._all, self._small.own, self._large.own):
            for name in _PoolStatistics.__slots__:
                getattr(statistics, name).reset_peak()
        self._oversize_allocations.reset_peak()
        self._oversize_segments.reset_peak()

    def memory_stats(self) -> dict[str, int]:
        """What torch.cuda.memory_stats would say, by the same names, sorted."""
        stats = {
            "max_split_size": self.settings.max_split_size_bytes or -1,
            "num_alloc_retries": self.num_alloc_retries,
            "num_device_alloc": self.num_device_alloc,
            "num_device_free": self.num_device_free,
            "num_oom_rejections": self.num_oom_rejections,
            "num_ooms": self.num_ooms,
            "num_sync_all_streams": self.num_sync_all_streams,
        }
        for group, statistics in (
            ("all", self._all),
            ("small_pool", self._small.own),
            ("large_pool", self._large.own),
        ):
            for name, field in _STATISTIC_NAMES.items():
                stats |= getattr(statistics, field).items(f"{name}.{group}")
        stats |= self._oversize_allocations.items("oversize_allocations")
        stats |= self._oversize_segments.items("oversize_segments")
        return dict(sorted(stats.items()))

    def segments(self) -> tuple[Segment, ...]:
        """What is reserved now, in address order."""
        return tuple(
            self._segment_record(blocks)
            for head in self._heads.values()
            for blocks in _mapped_ranges(head)
        )

    def _segment_record(self, blocks: list[Block]) -> Segment:
        allocated = [block for block in blocks if block.allocated]
        first = blocks[0]
        return Segment(
            address=first.address,
            total_size=sum(block.size_bytes for block in blocks),
            allocated_size=sum(block.size_bytes for block in allocated),
            requested_size=sum(block.requested_bytes for block in allocated),
            stream=first.stream,
            segment_type=first.pool.size_class.name,
            is_expandable=self._expandable,
            blocks=tuple(
                SegmentBlock(
                    block.address,
                    block.size_bytes,
                    block.requested_bytes,
                    "active_allocated" if block.allocated else "inactive",
                )
                for block in blocks
            ),
        )

    def _rounded_to_powers(self, num_bytes: int) -> int:
        """The size of a block under `roundup_power2_divisions` (round_size)."""
        interval = min(max(num_bytes.bit_length() - 21, 0), NUM_ROUNDUP_INTERVALS - 1)
        divisions = self._divisions[interval]
        if divisions > 1 and num_bytes > MIN_BLOCK_BYTES * divisions:
            step = (1 << (num_bytes.bit_length() - 1)) // divisions
            return round_up(num_bytes, step)
        return (num_bytes + MIN_BLOCK_BYTES - 1) & -MIN_BLOCK_BYTES

    def _take_cached(self, pool: _Pool, size: int) -> Block | None:
        """The best fit among the cached blocks of a stream (get_free_block)."""
        if self._collecting:
            pool.size_class.num_searches += 1
        index = bisect_left(pool.keys, size << _ADDRESS_BITS)
        if index == len(pool.keys):
            return None
        if self._expandable:
            index = pool.least_reaching(index)
        block = pool.blocks[index]
        if block.size_bytes >= self._max_split_bytes and (
            size < self._max_split_bytes
            or block.size_bytes >= size + self._rounding_bytes
        ):
            return None
        pool.remove_at(index)
        return block

    def _take_new(self, pool: _Pool, size: int, num_bytes: int) -> Block:
        """A block of new memory; on refusal, the cache is returned first (malloc)."""
        if self._collecting:
            self._collect_garbage()
        block = self._reserve(pool, size, num_bytes)
        if block is None and self._release_oversize(pool, size):
            block = self._reserve(pool, size, num_bytes)
        if block is None:
            self.empty_cache()
            self.num_alloc_retries += 1
            block = self._reserve(pool, size, num_bytes)
        if block is None:
            self.num_ooms += 1
            raise self._out_of_memory(num_bytes)
        return block

    def _hand_out(self, block: Block, size: int, num_bytes: int) -> None:
        """Marks a block as allocated, its remainder split off (alloc_found_block)."""
        pool = block.pool
        was_split = block.previous is not None or block.next is not None
        split_count = split_bytes = 0
        rest_bytes = block.size_bytes - size
        if rest_bytes and self._should_split(pool, rest_bytes, size):
            rest = block.split(size)
            pool.insert(rest)
            if was_split:
                split_bytes = -size
            else:
                split_count, split_bytes = 1, rest_bytes
        elif was_split:
            split_count, split_bytes = -1, -block.size_bytes
        if self._expandable:
            split_count = split_bytes = 0
        size_bytes = block.size_bytes
        block.allocated = True
        block.requested_bytes = num_bytes
        for statistics in pool.statistics:
            statistics.count_malloc(size_bytes, num_bytes)
            if split_count or split_bytes:
                statistics.change_inactive_split(split_count, split_bytes)
        if size_bytes >= self._max_split_bytes:
            self._oversize_allocations.increase(1)

    def _should_split(self, pool: _Pool, rest_bytes: int, size: int) -> bool:
        """Whether a remainder becomes a block of its own (should_split)."""
        if self._expandable or pool.size_class is self._small:
            return rest_bytes >= MIN_BLOCK_BYTES
        return rest_bytes > SMALL_LIMIT_BYTES and size < self._max_split_bytes

    def _cache(self, block: Block) -> tuple[int, int]:
        """Merges a block that was freed or mapped into its pool (try_merge_blocks).

        Returns how the number and the bytes of free parts of segments change.
        """
        pool = block.pool
        split_count = split_bytes = 0
        after = block.next
        if after is not None and after.mapped and not after.allocated:
            pool.remove(after)
            split_count -= 1
            split_bytes -= after.size_bytes
            block.absorb_next()
        before = block.previous
        if before is not None and before.mapped and not before.allocated:
            pool.remove(before)
            split_count -= 1
            split_bytes -= before.size_bytes
            before.absorb_next()
            block = before
        pool.insert(block)
        if self._expandable:
            return 0, 0
        if block.previous is not None or block.next is not None:
            return split_count + 1, split_bytes + block.size_bytes
        return split_count, split_bytes

    def _reserve(self, pool: _Pool, size: int, num_bytes: int) -> Block | None:
        """A free block of new memory outside its pool, or None (alloc_block)."""
        large_bytes = self.settings.large_segment_size_bytes
        num_segment_bytes = segment_bytes(size, large_bytes)
        wanted_bytes = self.reserved_bytes + num_segment_bytes
        if wanted_bytes > self._allowed_bytes:
            return None
        if self._rejecting and wanted_bytes > self._device_bytes:
            self.num_oom_rejections += 1
            raise self._out_of_memory(num_bytes)
        if self._expandable:
            return self._expand(pool, size)
        if wanted_bytes > self._capacity_bytes:
            return None
        address = self._addresses.take(num_segment_bytes)
        block = Block(pool, address, num_segment_bytes)
        self._heads[block.address] = block
        self._count_device_alloc(pool, num_segment_bytes)
        for statistics in pool.statistics:
            statistics.segment.increase(1)
        if num_segment_bytes >= self._max_split_bytes:
            self._oversize_segments.increase(1)
        return block

    def _release(self, block: Block) -> None:
        """Returns a segment that is one free block to the driver (release_block)."""
        pool = block.pool
        pool.remove(block)
        del self._heads[block.address]
        self._addresses.give_back(block.address, block.size_bytes)
        self._count_device_free(pool, block.size_bytes)
        for statistics in pool.statistics:
            statistics.segment.decrease(1)
        if block.size_bytes >= self._max_split_bytes:
            self._oversize_segments.decrease(1)

    def _release_oversize(self, pool: _Pool, size: int) -> bool:
        """Returns unsplittable segments, if enough (release_available_cached_blocks).

        Those released stay so, even if they were not enough.
        """
        if self._max_split_bytes == UNLIMITED_BYTES or self._expandable:
            return False
        target_bytes = max(size, self._max_split_bytes)
        index = bisect_left(pool.keys, target_bytes << _ADDRESS_BITS)
        if index < len(pool.keys):
            self._release(pool.blocks[index])
            return True
        released_bytes = 0
        while released_bytes < target_bytes and pool.blocks:
            largest = pool.blocks[-1]
            if largest.size_bytes < self._max_split_bytes:
                break
            released_bytes += largest.size_bytes
            self._release(largest)
        return released_bytes >= target_bytes

    def _collect_garbage(self) -> None:
        """Returns large segments, the older half first (garbage_collect_cached_blocks).

        A cached segment's age is the number of searches of the pool that passed it by.
        """
        threshold = int(
            self.settings.garbage_collection_threshold * self._allowed_bytes
        )
        target_bytes = self.reserved_bytes - threshold
        if target_bytes <= 0 or self._expandable:
            return
        ages = {
            block: self._large.num_searches - block.cached_at
            for pool in self._large.in_stream_order()
            for block in pool.blocks
            if not block.is_split
        }
        while target_bytes > 0 and ages:
            mean_age = sum(ages.values()) / len(ages)
            for block in [block for block, age in ages.items() if age >= mean_age]:
                target_bytes -= block.size_bytes
                del ages[block]
                self._release(block)

    def _expand(self, pool: _Pool, size: int) -> Block | None:
        """Maps pages until a free block holds a size (try_allocate_expandable_block).

        None if the driver refuses; what was mapped before stays.
        """
        block = self._expandable_block(pool, size)
        if not block.mapped:
            mapped = self._map_pages(block, min(block.size_bytes, size))
            if mapped is None:
                return None
            block = mapped
        while block.size_bytes < size:
            after = block.next
            if after is None:
                return None  # no addresses left, which cannot be on a real card
            missing_bytes = size - block.size_bytes
            mapped = self._map_pages(after, min(after.size_bytes, missing_bytes))
            if mapped is None:
                return None
            block = mapped
        pool.remove(block)
        return block

    def _expandable_block(self, pool: _Pool, size: int) -> Block:
        """The lowest run of free and unmapped blocks that holds a size.

        In a new segment if there is none (find_expandable_block).
        """
        for unmapped in pool.unmapped:
            before = unmapped.previous
            start = before if before is not None and not before.allocated else unmapped
            if _has_room(start, size):
                return start
        # Addresses for 9/8 of the card (ExpandableSegment).
        page_bytes = pool.size_class.page_bytes
        num_pages = -(-(self._device_bytes + self._device_bytes // 8) // page_bytes)
        space_bytes = num_pages * page_bytes
        block = Block(pool, self._addresses.take(space_bytes), space_bytes)
        block.mapped = False
        self._heads[block.address] = block
        pool.unmapped.append(block)
        return block

    def _map_pages(self, block: Block, num_bytes: int) -> Block | None:
        """Backs the start of an unmapped block with pages (map_block).

        Returns the free block that they are part of then; None if the driver refuses.
        """
        pool = block.pool
        page_bytes = pool.size_class.page_bytes
        mapped_bytes = round_up(num_bytes, page_bytes)
        if self.reserved_bytes + mapped_bytes > self._capacity_bytes:
            return None
        index = pool.unmapped.index(block)
        if mapped_bytes < block.size_bytes:
            rest = block.split(mapped_bytes)
            rest.mapped = False
            pool.unmapped[index] = rest
        else:
            del pool.unmapped[index]
        block.mapped = True
        before = block.previous
        joins = before is not None and before.mapped and not before.allocated
        self._cache(block)
        self._count_device_alloc(pool, mapped_bytes)
        return before if joins else block

    def _unmap_pages(self, block: Block) -> None:
        """Returns the whole pages within a free block to the driver (unmap_block).

        A segment without pages goes whole (release_expandable_segment).
        """
        pool = block.pool
        start, end = self._page_range(block)
        if start >= end:
            return
        pool.remove(block)
        if start > block.address:
            pages = block.split(start - block.address)
            pool.insert(block)
            block = pages
        if end < block.address + block.size_bytes:
            pool.insert(block.split(end - block.address))
        block.mapped = False
        self._count_device_free(pool, end - start)
        block = self._merge_unmapped(block)
        if not block.is_split:
            pool.unmapped.remove(block)
            del self._heads[block.address]

    def _page_range(self, block: Block) -> tuple[int, int]:
        """Where the whole pages within a block start and end (ExpandableSegment.unmap).

        Pages lie on the grid that starts with the segment.
        """
        page_bytes = block.pool.size_class.page_bytes
        head = block
        while head.previous is not None:
            head = head.previous
        offset = block.address - head.address
        start = round_up(offset, page_bytes)
        end = (offset + block.size_bytes) // page_bytes * page_bytes
        return head.address + start, head.address + end

    def _merge_unmapped(self, block: Block) -> Block:
        """Joins an unmapped block with its unmapped neighbours."""
        unmapped = block.pool.unmapped
        if block.next is not None and not block.next.mapped:
            unmapped.remove(block.next)
            block.absorb_next()
        if block.previous is not None and not block.previous.mapped:
            block = block.previous
            unmapped.remove(block)
            block.absorb_next()
        position = bisect_left(unmapped, block.address, key=lambda b: b.address)
        unmapped.insert(position, block)
        return block

    def _count_device_alloc(self, pool: _Pool, num_bytes: int) -> None:
        self.num_device_alloc += 1
        for statistics in pool.size_class.statistics:
            statistics.reserved_bytes.increase(num_bytes)

    def _count_device_free(self, pool: _Pool, num_bytes: int) -> None:
        self.num_device_free += 1
        for statistics in pool.size_class.statistics:
            statistics.reserved_bytes.decrease(num_bytes)

    def _out_of_memory(self, num_bytes: int) -> OutOfMemory:
        limits = [self._capacity_bytes, self._allowed_bytes]
        if self._rejecting:
            limits.append(self._device_bytes)
        return OutOfMemory(
            num_bytes, self.allocated_bytes, self.reserved_bytes, min(limits)
        )


class _Statistic:
    """A count or a sum of bytes (c10/core/Allocator.h, Stat)."""

    __slots__ = ("current", "increased", "peak")

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self.increased = 0

    def increase(self, amount: int) -> None:
        self.increased += amount
        current = self.current = self.current + amount
        if current > self.peak:
            self.peak = current

    def decrease(self, amount: int) -> None:
        self.current -= amount

    def reset_peak(self) -> None:
        self.peak = self.current

    def items(self, name: str) -> dict[str, int]:
        """The four numbers as torch.cuda.memory_stats names them."""
        return {
            f"{name}.current": self.current,
            f"{name}.peak": self.peak,
            f"{name}.allocated": self.increased,
            f"{name}.freed": self.increased - self.current,
        }


class _PoolStatistics:
    """The statistics of one pool, or of both (CachingDeviceAllocator.h, DeviceStats).

    `active` has none of its own: without second streams it equals `allocated`.
    """

    __slots__ = (
        "allocated_bytes",
        "allocation",
        "inactive_split",
        "inactive_split_bytes",
        "requested_bytes",
        "reserved_bytes",
        "segment",
    )

    def __init__(self) -> None:
        self.allocation = _Statistic()
        self.segment = _Statistic()
        self.inactive_split = _Statistic()
        self.allocated_bytes = _Statistic()
        self.reserved_bytes = _Statistic()
        self.inactive_split_bytes = _Statistic()
        self.requested_bytes = _Statistic()

    def count_malloc(self, size_bytes: int, requested_bytes: int) -> None:
        """Counts a block as handed out; written out, for every event passes here."""
        allocation = self.allocation
        allocation.increased += 1
        current = allocation.current = allocation.current + 1
        if current > allocation.peak:
            allocation.peak = current
        allocated = self.allocated_bytes
        allocated.increased += size_bytes
        current = allocated.current = allocated.current + size_bytes
        if current > allocated.peak:
            allocated.peak = current
        requested = self.requested_bytes
        requested.increased += requested_bytes
        current = requested.current = requested.current + requested_bytes
        if current > requested.peak:
            requested.peak = current

    def count_free(self, size_bytes: int, requested_bytes: int) -> None:
        """Counts a block as returned."""
        self.allocation.current -= 1
        self.allocated_bytes.current -= size_bytes
        self.requested_bytes.current -= requested_bytes

    def change_inactive_split(self, count: int, num_bytes: int) -> None:
        """Counts free parts of segments that are partly in use; net, as free_block."""
        if count > 0:
            self.inactive_split.increase(count)
        else:
            self.inactive_split.current += count
        if num_bytes > 0:
            self.inactive_split_bytes.increase(num_bytes)
        else:
            self.inactive_split_bytes.current += num_bytes


def segment_bytes(size: int, large_bytes: int = LARGE_SEGMENT_BYTES) -> int:
    """The size of a new segment for a block of so many bytes (get_allocation_size)."""
    if size <= SMALL_LIMIT_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < MIN_LARGE_BYTES:
        return large_bytes
    return round_up(size, LARGE_ROUNDING_BYTES)


_STATISTIC_NAMES = {
    "active": "allocation",
    "active_bytes": "allocated_bytes",
    "allocated_bytes": "allocated_bytes",
    "allocation": "allocation",
    "inactive_split": "inactive_split",
    "inactive_split_bytes": "inactive_split_bytes",
    "requested_bytes": "requested_bytes",
    "reserved_bytes": "reserved_bytes",
    "segment": "segment",
}


class _SizeClass:
    """The small or the large pool of all streams (BlockPool)."""

    def __init__(self, name: str, page_bytes: int, all_: _PoolStatistics) -> None:
        self.name = name
        self.page_bytes = page_bytes
        self.num_searches = 0
        self.own = _PoolStatistics()
        self.statistics = (all_, self.own)
        self.pools: dict[int, _Pool] = {}

    def add_pool(self, stream: int) -> _Pool:
        pool = self.pools[stream] = _Pool(self, stream)
        return pool

    def in_stream_order(self) -> list[_Pool]:
        return [self.pools[stream] for stream in sorted(self.pools)]


class _Pool:
    """The cached blocks of one stream, ordered by size, then address."""

    __slots__ = ("blocks", "keys", "size_class", "statistics", "stream", "unmapped")

    def __init__(self, size_class: _SizeClass, stream: int) -> None:
        self.size_class = size_class
        self.statistics = size_class.statistics
        self.stream = stream
        # One integer orders like (size, address), and bisects several times as fast.
        self.keys: list[int] = []
        self.blocks: list[Block] = []
        self.unmapped: list[Block] = []

    def insert(self, block: Block) -> None:
        block.cached_at = self.size_class.num_searches
        key = block.size_bytes << _ADDRESS_BITS | block.address
        index = bisect_left(self.keys, key)
        self.keys.insert(index, key)
        self.blocks.insert(index, block)

    def remove(self, block: Block) -> None:
        key = block.size_bytes << _ADDRESS_BITS | block.address
        self.remove_at(bisect_left(self.keys, key))

    def remove_at(self, index: int) -> None:
        del self.keys[index]
        del self.blocks[index]

    def least_reaching(self, index: int) -> int:
        """From a fit on, the first block whose successor reaches as far.

        What a block can grow to counts as its size, so that the open end of an
        expandable segment is taken last (get_free_block).
        """
        blocks = self.blocks
        while (
            index + 1 < len(blocks)
            and blocks[index + 1].reach_bytes < blocks[index].reach_bytes
        ):
            index += 1
        return index


def _mapped_ranges(head: Block) -> Iterator[list[Block]]:
    """The runs of mapped blocks of a segment."""
    run: list[Block] = []
    block: Block | None = head
    while block is not None:
        if block.mapped:
            run.append(block)
        elif run:
            yield run
            run = []
        block = block.next
    if run:
        yield run


def _has_room(block: Block | None, size: int) -> bool:
    """Whether blocks that are not allocated hold a size, from the given one on."""
    room_bytes = 0
    while room_bytes < size and block is not None and not block.allocated:
        room_bytes += block.size_bytes
        block = block.next
    return room_bytes >= size


def _allowed_bytes(settings: AllocatorSettings, device_bytes: int | None) -> int:
    """What `per_process_memory_fraction` allows (setMemoryFraction)."""
    fraction = settings.per_process_memory_fraction
    needing = [_FRACTION] if fraction < 1 else []
    if settings.throw_on_cudamalloc_oom:
        needing.append("throw_on_cudamalloc_oom")
    if needing and device_bytes is None:
        raise _bad(
            needing[0],
            getattr(settings, needing[0]),
            "needs the card's whole memory, which is not known",
            "name the card",
        )
    if fraction == 1 or device_bytes is None:
        return UNLIMITED_BYTES
    return int(fraction * device_bytes)
