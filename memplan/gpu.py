"""Where training runs: a card of the catalog, a bare size, or this machine's device.

Notable:
* Capacity is the total that torch sees. It is less than nvidia-smi's total by what the
  driver keeps, and that is less than the number on the box.
* A name finds a card only when it says which: `v100` is refused, for there are two.
* Whatever was not read but assumed is a sentence in `Gpu.assumptions`.
* NVML is imported only for `auto`; its errors become InputError in `nvml_session`.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from memplan import machine
from memplan.errors import InputError, UnknownNameError
from memplan.store import profiles_path, read_json
from memplan.units import BYTES_PER_UNIT, GIB, MIB, format_bytes, is_size, parse_size

Card = Mapping[str, Any]
"""One file of `profiles/gpus/`, as it is."""

SIZE_CAPABILITY = (8, 6)
"""What a bare size stands for: consumer Ampere, the oldest with native bfloat16."""

NATIVE_BF16_CAPABILITY = (8, 0)
"""The first capability that multiplies bfloat16 natively, by every card of the catalog
(7.5 emulates it)."""

LINUX_DESKTOP_BYTES = 615 * MIB
"""0.6 GiB rounded up, just above a desktop in use in a public nvidia-smi log: 183 MiB
for Xorg, 244 for the shell and 149 for a browser, 576 in all."""

WINDOWS_SHARE_BYTES = GIB
"""What WDDM and the desktop keep of a card. Public reports: 942 MiB in use at idle on
an RTX 5060 Ti, 1059 MiB on an RTX 5080, about 1 GB never usable on a 6 GB card
(pytorch#67971)."""

SYSTEMS = ("linux", "windows", "wsl")

IGNORED_WORDS = ("nvidia", "geforce", "tesla", "quadro", "amd", "instinct", "gpu")
"""Words that tell no card from another, so a name may have or lack them."""

SIMILAR_SIZES = (3, 4)
"""Cards whose nominal sizes are no further apart than this are of similar size."""

TOTAL_TOLERANCE = 0.10
"""How far a device's total may be from the catalog's for it to be that card: ECC takes
a sixteenth, and cards that share a name differ by a sixth or more (RTX 3080)."""

_FIELD = "--gpu"
_REMEDY = (
    "give a card of the catalog, or a size such as 12GB (10^9 bytes) "
    "or 11.6GiB (2^30 bytes)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The device that trains, and how much of its memory training may have.

    Raises InputError when nothing is left for training.

    >>> import memplan
    >>> card = memplan.find_gpu("RTX 3060", reserve_bytes=2**30)
    >>> card.name, card.compute_capability
    ('GeForce RTX 3060 12GB', (8, 6))
    >>> card.budget_bytes == card.capacity_bytes - card.context_bytes - 2**30
    True
    """

    name: str
    capacity_bytes: int
    """The total that `torch.cuda.get_device_properties` reports."""
    reserve_bytes: int = 0
    """Kept back: the user's reserve, a desktop, or other processes."""
    context_bytes: int
    """What the CUDA context and loaded kernels take outside torch's allocator."""
    compute_capability: tuple[int, int]
    memory_bandwidth_gbps: float | None = None
    """In 10^9 bytes a second."""
    bf16_dense_tflops: float | None = None
    native_bf16: bool = True
    assumptions: tuple[str, ...] = ()
    """One sentence for each figure that was not read from this very device."""

    def __post_init__(self) -> None:
        if self.budget_bytes <= 0:
            raise InputError(
                _FIELD,
                self.name,
                f"leaves nothing to train in: {format_bytes(self.capacity_bytes)} less "
                f"{format_bytes(self.reserve_bytes)} kept back and "
                f"{format_bytes(self.context_bytes)} for the CUDA context",
                "keep back less, or give a larger card or size",
            )

    @property
    def budget_bytes(self) -> int:
        """What torch's caching allocator may reserve."""
        return self.capacity_bytes - self.reserve_bytes - self.context_bytes

    def to_json(self) -> dict[str, Any]:
        """The card as output shows it; bytes are integers, the capability is text."""
        major, minor = self.compute_capability
        return {
            "name": self.name,
            "capacity_bytes": self.capacity_bytes,
            "reserve_bytes": self.reserve_bytes,
            "context_bytes": self.context_bytes,
            "budget_bytes": self.budget_bytes,
            "compute_capability": f"{major}.{minor}",
            "memory_bandwidth_gbps": self.memory_bandwidth_gbps,
            "bf16_dense_tflops": self.bf16_dense_tflops,
            "native_bf16": self.native_bf16,
            "assumptions": list(self.assumptions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gpu:
        """The card that `to_json` wrote."""
        major, minor = map(int, data["compute_capability"].split("."))
        return cls(
            name=data["name"],
            capacity_bytes=data["capacity_bytes"],
            reserve_bytes=data["reserve_bytes"],
            context_bytes=data["context_bytes"],
            compute_capability=(major, minor),
            memory_bandwidth_gbps=data["memory_bandwidth_gbps"],
            bf16_dense_tflops=data["bf16_dense_tflops"],
            native_bf16=data["native_bf16"],
            assumptions=tuple(data["assumptions"]),
        )

    @classmethod
    def from_card(
        cls, card: Card, *, os_name: str = "linux", context_bytes: int | None = None
    ) -> Gpu:
        """The GPU that a card of the catalog is, with nothing kept back.

        On Windows and WSL the capacity is all dedicated memory, as torch reports it
        there. Raises InputError for a card whose total memory nobody has read.
        """
        capacity_bytes, source = _capacity(card, _system(os_name, "linux"))
        context_bytes, context = _context(card, capacity_bytes, context_bytes)
        return cls(
            name=card["name"],
            capacity_bytes=capacity_bytes,
            context_bytes=context_bytes,
            compute_capability=_capability(card),
            memory_bandwidth_gbps=card["mem_bandwidth_gbps"],
            bf16_dense_tflops=card["bf16_dense_tflops"],
            native_bf16=card["bf16"] == "native",
            assumptions=(source, *_card_notes(card), *context),
        )


def gpus() -> tuple[Gpu, ...]:
    """Every card of the catalog on Linux, by file name."""
    return tuple(Gpu.from_card(card) for card in cards())


def find_gpu(
    text: str,
    *,
    reserve_bytes: int = 0,
    display: bool = False,
    context_bytes: int | None = None,
    os_name: str | None = None,
) -> Gpu:
    """The GPU that a card's name, a size such as `12GB`, or `auto` means.

    `display` keeps back what a desktop takes. `os_name` is `linux`, `windows` or `wsl`;
    unless given, `auto` takes this machine's and everything else takes Linux. On the
    last two, dedicated memory less WDDM's share is the limit. `auto` keeps back what is
    in use at that moment, this process's own CUDA memory included. Raises
    UnknownNameError for a name that is in no catalog, InputError for any other text
    that is of no use.
    """
    _check_not_negative("--reserve", reserve_bytes)
    _check_not_negative("--context", context_bytes or 0)
    asked = text.strip()
    automatic = asked.casefold() == "auto"
    system = _system(os_name, _this_system() if automatic else "linux")
    if automatic:
        gpu = _from_reading(_read_device(), context_bytes)
    else:
        gpu = _asked_gpu(asked, system, context_bytes)
    if context_bytes is None and system == _this_system():
        gpu = _as_measured(gpu, automatic)
    return _keep_back(gpu, reserve_bytes, display, system)


@cache
def cards() -> tuple[Card, ...]:
    """Every file of the catalog, read-only, by file name."""
    files = sorted((profiles_path() / "gpus").glob("*.json"))
    return tuple(MappingProxyType(read_json(file)) for file in files)


def _asked_gpu(asked: str, system: str, context_bytes: int | None) -> Gpu:
    """The card or the size that a text means; a card's own name wins."""
    if not asked:
        raise InputError(_FIELD, asked, "is empty", _REMEDY)
    key = _key(asked)
    found = _exact_index().get(key) or _loose_index().get(key, ())
    if len(found) == 1:
        return Gpu.from_card(found[0], os_name=system, context_bytes=context_bytes)
    if found:
        names = ", ".join(card["name"] for card in found)
        raise InputError(
            _FIELD, asked, f"may be any of {names}", f"say which one, or {_REMEDY}"
        )
    if is_size(asked) and not _is_card_number(asked):
        return _from_size(asked, context_bytes)
    raise UnknownNameError(_FIELD, asked, _known_names(), _REMEDY)


def _as_measured(gpu: Gpu, automatic: bool) -> Gpu:
    """The GPU as `memplan doctor` measured it on this machine, where it did.

    What was assumed of its capacity and context is said no more.
    """
    reading = machine.find(gpu.name)
    if reading is None:
        return gpu
    assumed = ("Capacity is ", "The CUDA context is ")
    kept = (text for text in gpu.assumptions if not text.startswith(assumed))
    return replace(
        gpu,
        capacity_bytes=gpu.capacity_bytes if automatic else reading.capacity_bytes,
        context_bytes=reading.context_bytes,
        assumptions=(reading.sentence(), *kept),
    )


def _is_card_number(text: str) -> bool:
    """Whether a text is four digits as GeForce cards have them, and not a size."""
    match = re.fullmatch(r"[0-9]{4}\s*([a-zA-Z]*)", text)
    return match is not None and match[1].lower() not in BYTES_PER_UNIT


def _from_size(text: str, given_context_bytes: int | None) -> Gpu:
    capacity_bytes = parse_size(text, _FIELD)
    context_bytes, context = _context(None, capacity_bytes, given_context_bytes)
    major, minor = SIZE_CAPABILITY
    return Gpu(
        name=text,
        capacity_bytes=capacity_bytes,
        context_bytes=context_bytes,
        compute_capability=SIZE_CAPABILITY,
        assumptions=(
            f"{text} is taken as the total that torch sees, {capacity_bytes} bytes; a "
            "driver keeps 0.1 to 0.9 GiB of what the box says.",
            f"A size says nothing else, so compute capability is {major}.{minor} and "
            "memory bandwidth is unknown.",
            *context,
        ),
    )


def _capability(card: Card) -> tuple[int, int]:
    major, minor = card["compute_capability"].split(".")
    return int(major), int(minor)


def _card_notes(card: Card) -> Iterator[str]:
    if card["capacity_note"] is not None:
        yield card["capacity_note"]
    if card["vendor_class"].endswith("-amd"):
        yield (
            f"The {card['name']} runs ROCm ({card['compute_capability_note']}): its "
            "allocator, workspaces and kernels are taken to behave as CUDA's do."
        )


def _capacity(card: Card, os_name: str) -> tuple[int, str]:
    """The bytes that torch sees on a card, and the sentence that says whence."""
    name, dedicated = card["name"], _dedicated_mib(card)
    if os_name != "linux" and dedicated is not None:
        return dedicated * MIB, (
            f"Capacity is all dedicated memory of the {name}, {dedicated} MiB, as "
            "torch reports it on Windows and WSL."
        )
    exact = card["torch_total_bytes_exact"]
    if exact is not None:
        return exact, f"Capacity is the total that torch reported for a {name}."
    lowest = card["torch_total_mib_linux_low"]
    if lowest is not None:
        return lowest * MIB, (
            f"Capacity is the lowest total that torch was seen to report for the "
            f"{name} on Linux, {lowest} MiB; yours may have a little more."
        )
    return _capacity_less_reserve(card, dedicated)


def _capacity_less_reserve(card: Card, dedicated: int | None) -> tuple[int, str]:
    """nvidia-smi's total less the most that the driver keeps on the card's peers."""
    peers = _peers(card)
    if dedicated is None or not peers:
        raise InputError(
            _FIELD,
            card["name"],
            "has no known total memory",
            "give its size instead, such as 16GB (10^9 bytes) or 15.5GiB (2^30 bytes)",
        )
    worst = max(peers, key=_driver_reserve_mib)
    reserve = _driver_reserve_mib(worst)
    return (dedicated - reserve) * MIB, (
        f"Capacity is the full {dedicated} MiB of the {card['name']} less {reserve} "
        "MiB for the driver: no torch total on Linux is known, and that is the most "
        f"kept on the catalog's nearest cards in class and size (the {worst['name']})."
    )


def _dedicated_mib(card: Card) -> int | None:
    """All memory of a card, as nvidia-smi shows it and as torch does on Windows."""
    total: int | None = card["smi_total_mib"]
    return card["torch_total_mib_windows_wsl"] if total is None else total


def _driver_reserve_mib(card: Card) -> int:
    reserve: int = card["smi_total_mib"] - card["torch_total_mib_linux_low"]
    return reserve


def _peers(card: Card) -> list[Card]:
    """Cards whose driver reserve is known, the nearest kind that the catalog has.

    Of the same class and similar size; else with laptop and desktop as one class; else
    of whatever size.
    """
    known = [
        peer
        for peer in cards()
        if peer["smi_total_mib"] is not None
        and peer["torch_total_mib_linux_low"] is not None
        and _family(peer) == _family(card)
    ]
    similar = [peer for peer in known if _is_similar_size(peer, card)]
    same = [peer for peer in similar if peer["vendor_class"] == card["vendor_class"]]
    return same or similar or known


def _family(card: Card) -> str:
    return str(card["vendor_class"]).removesuffix("-laptop")


def _is_similar_size(one: Card, other: Card) -> bool:
    small, large = sorted((one["nominal_gb"], other["nominal_gb"]))
    return bool(large * SIMILAR_SIZES[0] <= small * SIMILAR_SIZES[1])


def _context(
    card: Card | None, capacity_bytes: int, given_bytes: int | None
) -> tuple[int, tuple[str, ...]]:
    """The context to plan with, and the sentence for it unless it was given."""
    if given_bytes is not None:
        return given_bytes, ()
    planned = None if card is None else card["planning_context_mib"]
    if card is None or planned is None:
        size_bytes = capacity_bytes if card is None else card["nominal_gb"] * GIB
        planned, nominal_gb = _context_of_size(size_bytes)
        why = f"the largest that the catalog plans for a card of {nominal_gb} GB"
        why += "" if card is None else f", as it plans none for the {card['name']}"
    elif card["planning_context_source"].startswith(_MEASURED):
        return int(planned) * MIB, (
            f"The CUDA context is planned at {planned} MiB, as it was measured on such "
            "a card after a training step; with other drivers it may differ.",
        )
    else:
        why = f"what readings of the {card['name']}'s class round up to"
    return planned * MIB, (
        f"The CUDA context is planned at {planned} MiB: {why}. That is a choice; a "
        "measured context is better.",
    )


_MEASURED = "measured"
"""Begins the source of a context that is no choice."""


def _context_of_size(size_bytes: int) -> tuple[int, int]:
    """The largest planned context in MiB of a size class, and the class's GB.

    The class is the smallest nominal size that holds the bytes, among cards with native
    bfloat16.
    """
    planned = [
        (card["nominal_gb"], card["planning_context_mib"])
        for card in cards()
        if card["planning_context_mib"] is not None and card["bf16"] == "native"
    ]
    sizes = {nominal_gb for nominal_gb, _ in planned}
    holding = [nominal_gb for nominal_gb in sizes if nominal_gb * GIB >= size_bytes]
    nominal_gb = min(holding, default=max(sizes))
    return max(mib for size, mib in planned if size == nominal_gb), nominal_gb


def _keep_back(gpu: Gpu, reserve_bytes: int, display: bool, system: str) -> Gpu:
    """The GPU less the user's reserve and the larger of desktop and other processes."""
    desktop_bytes, desktop = _desktop(display, system)
    spared = gpu.reserve_bytes >= desktop_bytes
    kept_bytes = reserve_bytes + max(gpu.reserve_bytes, desktop_bytes)
    if reserve_bytes >= gpu.budget_bytes:
        raise InputError(
            "--reserve",
            format_bytes(reserve_bytes),
            f"leaves nothing of the {format_bytes(gpu.budget_bytes)} that {gpu.name} "
            "has for training",
            "keep back less, or give a larger card or size",
        )
    return replace(
        gpu,
        reserve_bytes=kept_bytes,
        assumptions=(
            *gpu.assumptions,
            *(() if spared else desktop),
            *_system_notes(system),
        ),
    )


def _desktop(display: bool, system: str) -> tuple[int, tuple[str, ...]]:
    """What a desktop and its window system keep, and the sentence for it."""
    if system != "linux":
        return WINDOWS_SHARE_BYTES, (
            f"{format_bytes(WINDOWS_SHARE_BYTES)} is kept back for WDDM and the "
            "desktop of Windows, as public readings of idle cards show.",
        )
    if display:
        return LINUX_DESKTOP_BYTES, (
            f"{format_bytes(LINUX_DESKTOP_BYTES)} is kept back for a Linux desktop, "
            "the upper end of public readings (0.3 to 0.6 GiB).",
        )
    return 0, ()


def _system_notes(system: str) -> tuple[str, ...]:
    if system == "linux":
        return ()
    return (
        "Past dedicated memory the Windows driver spills into host memory instead of "
        "failing: a run that does not fit crawls, with no out-of-memory error.",
    )


def _system(os_name: str | None, default: str) -> str:
    if os_name is None:
        return default
    system = os_name.strip().casefold()
    if system not in SYSTEMS:
        raise UnknownNameError("--os", os_name, SYSTEMS)
    return system


def _this_system() -> str:
    """The system that runs memplan; WSL says so in its kernel's release."""
    if sys.platform == "win32":
        return "windows"
    return "wsl" if "microsoft" in os.uname().release.casefold() else "linux"


def _check_not_negative(field: str, num_bytes: int) -> None:
    if num_bytes < 0:
        raise InputError(field, num_bytes, "is negative", "give 0 bytes or more")


def _key(text: str) -> str:
    """A name without case, spaces, dashes, underscores, brackets and vendors' words."""
    key = re.sub(r"[\s\-_/()]+", "", text.casefold())
    for word in IGNORED_WORDS:
        key = key.replace(word, "")
    return key


@cache
def _exact_index() -> dict[str, tuple[Card, ...]]:
    """The card that each name and alias says."""
    return _spelt(_exact_keys)


@cache
def _loose_index() -> dict[str, tuple[Card, ...]]:
    """The cards that each shortened name may mean."""
    return _spelt(_loose_keys)


def _spelt(keys_of: Callable[[Card], set[str]]) -> dict[str, tuple[Card, ...]]:
    index: dict[str, tuple[Card, ...]] = {}
    for card in cards():
        for key in keys_of(card):
            index[key] = (*index.get(key, ()), card)
    return index


def _exact_keys(card: Card) -> set[str]:
    """A card's name, aliases and device names; an alias also with `RTX` and size."""
    series = _series(card)
    aliases = {_key(alias) for alias in card["aliases"]}
    aliases |= {series + alias for alias in aliases if alias[0].isdigit()}
    names = {_key(name) for name in (card["name"], *card["device_names"])}
    return names | aliases | _with_size(card, aliases)


def _loose_keys(card: Card) -> set[str]:
    """A card's name without sizes, brackets or `RTX`; and with its nominal size."""
    name: str = card["name"]
    outside, _, bracket = name.partition("(")
    names = {outside, *(f"{outside} {part}" for part in bracket.split("/"))}
    names |= {re.sub(r"\b[0-9]+ ?GB\b", "", name) for name in names}
    keys = {_key(name) for name in names}
    keys |= {key.removeprefix(_series(card)) for key in keys}
    return keys | _with_size(card, keys)


def _series(card: Card) -> str:
    """`rtx` or `gtx` where a card's name begins so, which people leave out."""
    match = re.match("[rg]tx", _key(card["name"]))
    return match[0] if match else ""


def _with_size(card: Card, keys: Iterable[str]) -> set[str]:
    size = f"{card['nominal_gb']}gb"
    return {key + size for key in keys if not key.endswith("gb")}


def _known_names() -> list[str]:
    return [name for card in cards() for name in (card["name"], *card["aliases"])]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """What NVML says of one device at one moment."""

    name: str
    total_bytes: int
    driver_bytes: int
    used_bytes: int
    compute_capability: tuple[int, int]
    notes: tuple[str, ...]


def _from_reading(reading: _Reading, given_context_bytes: int | None) -> Gpu:
    """The GPU that NVML read; the catalog adds speed and context where it knows it."""
    card = _card_of(reading)
    capacity_bytes = reading.total_bytes - reading.driver_bytes
    context_bytes, context = _context(card, capacity_bytes, given_context_bytes)
    return Gpu(
        name=reading.name,
        capacity_bytes=capacity_bytes,
        reserve_bytes=reading.used_bytes,
        context_bytes=context_bytes,
        compute_capability=reading.compute_capability,
        memory_bandwidth_gbps=None if card is None else card["mem_bandwidth_gbps"],
        bf16_dense_tflops=None if card is None else card["bf16_dense_tflops"],
        native_bf16=reading.compute_capability >= NATIVE_BF16_CAPABILITY,
        assumptions=(*reading.notes, *context),
    )


def _card_of(reading: _Reading) -> Card | None:
    """The only card of the catalog with that name and about that much memory."""
    key = _key(reading.name)
    named = {
        card["name"]: card
        for index in (_exact_index(), _loose_index())
        for card in index.get(key, ())
    }
    fitting = [card for card in named.values() if _has_total(card, reading.total_bytes)]
    return fitting[0] if len(fitting) == 1 else None


def _has_total(card: Card, total_bytes: int) -> bool:
    dedicated = _dedicated_mib(card)
    known_bytes = card["nominal_gb"] * GIB if dedicated is None else dedicated * MIB
    return bool(abs(total_bytes - known_bytes) <= TOTAL_TOLERANCE * known_bytes)


_NVML_PROBLEMS = {
    "NVML_ERROR_LIBRARY_NOT_FOUND": "finds no NVIDIA driver (NVML) on this machine",
    "NVML_ERROR_DRIVER_NOT_LOADED": "finds that the NVIDIA driver is not loaded",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "finds a driver and a driver library of different versions, as after an update "
        "without a restart"
    ),
    "NVML_ERROR_NO_PERMISSION": "may not read the device",
    "NVML_ERROR_NOT_SUPPORTED": "finds a device that does not tell its memory",
    "NVML_ERROR_GPU_IS_LOST": "finds that the device has fallen off the bus",
    "NVML_ERROR_INVALID_ARGUMENT": "finds no such device",
    "NVML_ERROR_NOT_FOUND": "finds no such device",
}
"""What each NVML error means to a reader; any other is shown as NVML words it."""


@contextmanager
def nvml_session() -> Iterator[Any]:
    """The module pynvml, initialised; its errors leave as InputError."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError as error:
        raise InputError(
            _FIELD,
            "auto",
            "needs the package nvidia-ml-py, which is not installed",
            f"install it with: pip install nvidia-ml-py; or {_REMEDY}",
        ) from error
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        problems = {getattr(nvml, name): text for name, text in _NVML_PROBLEMS.items()}
        problem = problems.get(error.value, f"got an error from NVML: {error}")
        raise InputError(_FIELD, "auto", problem, _REMEDY) from error


def _read_device() -> _Reading:
    with nvml_session() as nvml:
        handle, order = visible_device(nvml)
        total_bytes, driver_bytes, used_bytes, memory = _memory(nvml, handle)
        return _Reading(
            name=nvml.nvmlDeviceGetName(handle),
            total_bytes=total_bytes,
            driver_bytes=driver_bytes,
            used_bytes=used_bytes,
            compute_capability=nvml.nvmlDeviceGetCudaComputeCapability(handle),
            notes=(*order, *memory),
        )


def visible_device(nvml: Any) -> tuple[Any, tuple[str, ...]]:
    """The handle of the first device that CUDA may see, and a note where unsure."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    first = visible.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(first), ()
    if not re.fullmatch("[0-9]{1,4}", first):
        raise InputError(
            "CUDA_VISIBLE_DEVICES",
            visible,
            "leaves no device to read",
            f"let it begin with a device's number or UUID, or {_REMEDY}",
        )
    handle = nvml.nvmlDeviceGetHandleByIndex(int(first))
    in_order = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    if in_order or nvml.nvmlDeviceGetCount() == 1:
        return handle, ()
    return handle, (
        f"Device {first} is counted in PCI order, as nvidia-smi does; CUDA counts the "
        "fastest first unless CUDA_DEVICE_ORDER is PCI_BUS_ID.",
    )


def _memory(nvml: Any, handle: Any) -> tuple[int, int, int, tuple[str, ...]]:
    """Total, the driver's and other processes' bytes, with the notes on them.

    torch's total is NVML's total less what NVML calls reserved. Drivers before R510
    lack the second version of the call and count what they keep as used.
    """
    with suppress(nvml.NVMLError):
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return info.total, info.reserved, info.used, _in_use(info.used)
    info = nvml.nvmlDeviceGetMemoryInfo(handle)
    return info.total, 0, info.used, _in_use(info.used, " and by the driver")


def _in_use(used_bytes: int, also: str = "") -> tuple[str, ...]:
    if not used_bytes:
        return ()
    return (
        f"{format_bytes(used_bytes)} is in use now by other processes{also}, and is "
        "kept back.",
    )
