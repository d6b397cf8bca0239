"""The catalog's cards, the texts that find them, and what a reading of NVML becomes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.errors import InputError, UnknownNameError
from memplan.gpu import Gpu, cards, find_gpu, gpus
from memplan.store import profiles_path
from memplan.units import GIB, MIB

CATALOG_CSV = Path(__file__).parents[2] / "shared" / "catalog" / "gpus.csv"

TEXT, COUNT, NUMBER = (str,), (int,), (int, float)
REQUIRED = {
    "name": TEXT,
    "vendor_class": TEXT,
    "nominal_gb": COUNT,
    "compute_capability": TEXT,
    "bf16": TEXT,
    "price_class": TEXT,
}
OPTIONAL = {
    "smi_total_mib": COUNT,
    "smi_source": TEXT,
    "torch_total_bytes_exact": COUNT,
    "torch_total_mib_linux_low": COUNT,
    "torch_total_mib_linux_high": COUNT,
    "torch_total_mib_windows_wsl": COUNT,
    "torch_total_gib": TEXT,
    "torch_source": TEXT,
    "compute_capability_note": TEXT,
    "mem_bandwidth_gbps": NUMBER,
    "bandwidth_source": TEXT,
    "bf16_dense_tflops": NUMBER,
    "tflops_source": TEXT,
    "cuda_context_mib_observed": TEXT,
    "context_source": TEXT,
    "observed_context_gib_low": NUMBER,
    "observed_context_gib_high": NUMBER,
    "observed_context_source": TEXT,
    "planning_context_mib": COUNT,
    "planning_context_source": TEXT,
    "msrp_usd_hf": COUNT,
    "notes": TEXT,
    "capacity_note": TEXT,
}
LISTS = {"aliases", "device_names"}


def card_named(name: str) -> Any:
    return next(card for card in cards() if card["name"] == name)


def refusal(text: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        find_gpu(text, **options)
    return str(caught.value)


def test_every_card_file_has_the_fields_of_a_card():
    assert len(cards()) >= 77
    for card in cards():
        assert set(card) == set(REQUIRED) | set(OPTIONAL) | LISTS, card["name"]
        for key, types in (REQUIRED | OPTIONAL).items():
            value = card[key]
            assert (value is None and key in OPTIONAL) or type(value) in types, key
        for key in LISTS:
            assert all(type(item) is str and item for item in card[key]), key
        assert re.fullmatch(r"[0-9]+\.[0-9]+", card["compute_capability"])


def test_every_card_file_is_called_after_its_card():
    for file in (profiles_path() / "gpus").iterdir():
        name = json.loads(file.read_text(encoding="utf-8"))["name"]
        assert (
            file.name == f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
        )


def test_a_figure_has_its_source_and_a_range_its_order():
    for card in cards():
        for figure, source in (
            ("smi_total_mib", "smi_source"),
            ("torch_total_mib_linux_low", "torch_source"),
            ("mem_bandwidth_gbps", "bandwidth_source"),
            ("bf16_dense_tflops", "tflops_source"),
            ("cuda_context_mib_observed", "context_source"),
            ("observed_context_gib_high", "observed_context_source"),
            ("planning_context_mib", "planning_context_source"),
        ):
            assert card[figure] is None or card[source], (card["name"], figure)
        for stem in ("torch_total_mib_linux", "observed_context_gib"):
            low, high = card[f"{stem}_low"], card[f"{stem}_high"]
            assert low is None or low <= high, card["name"]


def test_windows_reports_the_total_that_nvidia_smi_shows():
    """This is why the one may stand for the other where it is missing."""
    known = [
        (card["smi_total_mib"], card["torch_total_mib_windows_wsl"])
        for card in cards()
        if card["smi_total_mib"] and card["torch_total_mib_windows_wsl"]
    ]

    assert len(known) > 20
    assert all(abs(smi - windows) <= 1 for smi, windows in known)


MEASURED_ANEW = {
    "H100 80GB HBM3 (SXM)": (
        "torch_total_bytes_exact",
        "torch_total_mib_linux_low",
        "torch_source",
        "cuda_context_mib_observed",
        "context_source",
        "planning_context_mib",
        "planning_context_source",
    ),
}
"""Columns that runs in `profiles/runs` know better than the table."""


@pytest.mark.skipif(not CATALOG_CSV.exists(), reason="the source table is not here")
def test_card_files_hold_the_source_table_row_by_row():
    with CATALOG_CSV.open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    held = {card["name"]: card for card in cards()}

    assert rows.keys() <= held.keys()
    for name, row in rows.items():
        for column, text in row.items():
            if column in MEASURED_ANEW.get(name, ()):
                continue
            assert as_written(held[name], column) == (text or None), (name, column)


def as_written(card: Any, column: str) -> str | None:
    """A card's fact in the words of the table, numbers compared as numbers."""
    value = card[column]
    if column == "aliases":
        return ";".join(value)
    if column == "compute_capability" and card["compute_capability_note"]:
        return f"{value} ({card['compute_capability_note']})"
    return None if value is None else Number(value) if value != str(value) else value


class Number(float):
    """A number that equals every way of writing it."""

    __hash__ = float.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and float(other) == float(self)


def test_every_name_and_alias_finds_its_card():
    for card in cards():
        for text in (card["name"], *card["aliases"], *card["device_names"]):
            assert find_gpu(text).name == card["name"], text


def test_gpus_lists_the_whole_catalog():
    assert [gpu.name for gpu in gpus()] == [card["name"] for card in cards()]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("rtx3060", "GeForce RTX 3060 12GB"),
        ("NVIDIA GeForce RTX 3060", "GeForce RTX 3060 12GB"),
        ("3060 12gb", "GeForce RTX 3060 12GB"),
        (" RTX 3060 12GB\n", "GeForce RTX 3060 12GB"),
        ("rtx_3060-laptop", "GeForce RTX 3060 Laptop 6GB"),
        ("NVIDIA GeForce RTX 3060 Laptop GPU", "GeForce RTX 3060 Laptop 6GB"),
        ("RTX 3080", "GeForce RTX 3080 10GB"),
        ("RTX 3080 12 GB", "GeForce RTX 3080 12GB"),
        ("RTX 4060 Ti", "GeForce RTX 4060 Ti 8GB"),
        ("RTX 4060 Ti 16GB", "GeForce RTX 4060 Ti 16GB"),
        ("4090", "GeForce RTX 4090"),
        ("RTX 4090 24GB", "GeForce RTX 4090"),
        ("4090laptop", "GeForce RTX 4090 Laptop"),
        ("tesla t4", "Tesla T4"),
        ("V100 32GB", "Tesla V100 32GB"),
        ("Tesla V100-SXM2-16GB", "Tesla V100 16GB"),
        ("a100 80gb", "A100-SXM4-80GB"),
        ("A100 40GB", "A100-SXM4-40GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3 (SXM)"),
        ("A6000 48GB", "RTX A6000"),
        ("MI250X", "AMD Instinct MI250X (per GCD)"),
    ],
)
def test_spelling_does_not_matter(text: str, name: str):
    assert find_gpu(text).name == name


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("V100", ["Tesla V100 16GB", "Tesla V100 32GB"]),
        ("a100 pcie", ["A100-PCIE-40GB", "A100 80GB PCIe"]),
        ("A100-SXM4", ["A100-SXM4-40GB", "A100-SXM4-80GB"]),
    ],
)
def test_an_ambiguous_name_is_refused_with_its_candidates(text, candidates):
    message = refusal(text)

    assert all(name in message for name in (text, *candidates))


@pytest.mark.parametrize(
    "text",
    [
        "GTX 1080",
        "1080",
        "RTX 3050",
        "3091",
        "4070foo",
        "RTX 5060 Ti 8GB",
        "3060 8GB",
        "TITAN",
        "RTX 6000",
        "nvidia",
        "8192",
        "RTX 3060!",
        "-",
        "12 GB 24 GB",
    ],
)
def test_a_card_that_is_not_in_the_catalog_is_not_replaced_by_another(text):
    with pytest.raises(UnknownNameError) as caught:
        find_gpu(text)

    assert text in str(caught.value)
    assert "12GB" in str(caught.value)


def test_an_unknown_card_is_answered_with_near_ones():
    assert "rtx3090" in refusal("RTX 3091")


@pytest.mark.parametrize("text", ["", "  ", "12", "0GB", "-1GB", "12G", "9e9", "100MB"])
def test_a_text_of_no_use_is_refused_by_field_and_value(text):
    message = refusal(text)

    assert message.startswith("--gpu: ")
    assert repr(text.strip()) in message


@pytest.mark.parametrize(
    ("text", "capacity_bytes", "context_mib"),
    [
        ("12GB", 12 * 10**9, 256),
        ("11.6GiB", 12_455_405_158, 256),  # 11.6 * 2^30 = 12455405158.4
        ("12gib", 12 * GIB, 256),
        ("16GB", 16 * 10**9, 410),  # 16 GB Blackwell
        ("24GB", 24 * 10**9, 512),  # RTX 4090
        ("48GB", 48 * 10**9, 512),  # RTX 6000 Ada
        ("80GB", 80 * 10**9, 758),  # A100, H100
        ("1TB", 10**12, 717),
    ],
)
def test_a_size_is_torchs_total_less_the_context_of_its_size(
    text, capacity_bytes, context_mib
):
    gpu = find_gpu(text)

    assert gpu.capacity_bytes == capacity_bytes
    assert gpu.context_bytes == context_mib * MIB
    assert gpu.budget_bytes == capacity_bytes - context_mib * MIB
    assert gpu.compute_capability == (8, 6)
    assert gpu.native_bf16
    assert gpu.memory_bandwidth_gbps is None
    assert any("8.6" in sentence for sentence in gpu.assumptions)
    assert any(f"{context_mib} MiB" in sentence for sentence in gpu.assumptions)


@pytest.mark.parametrize(
    ("name", "capacity_bytes"),
    [
        ("RTX 3060", 11899 * MIB),  # the lower of two totals seen
        ("RTX 6000 Ada", 50_865_307_648),  # exact
        ("RTX 4080", (16376 - 463) * MIB),  # RTX 5060 Ti: 16311 - 15848
        ("RTX 4070 SUPER", (12282 - 463) * MIB),  # 12 to 16 GB, the same card
        ("RTX 3070 Ti", (8191 - 439) * MIB),  # Windows total; RTX 3070: 8192 - 7753
        ("RTX 3060 Laptop", (6144 - 382) * MIB),  # RTX 4060 Laptop: 8188 - 7806
        ("RTX 4090 Laptop", (16376 - 463) * MIB),  # no such laptop, so desktop cards
        ("RTX A4500", (20470 - 316) * MIB),  # RTX A5000: 24564 - 24248
        ("L40", (46068 - 582) * MIB),  # A40: 46068 - 45486
    ],
)
def test_capacity_is_torchs_total_or_the_full_memory_less_the_drivers(
    name, capacity_bytes
):
    assert find_gpu(name).capacity_bytes == capacity_bytes


def test_a_derived_capacity_names_the_card_that_it_leans_on():
    assert "RTX A5000" in find_gpu("RTX A4500").assumptions[0]


def test_a_card_whose_total_nobody_has_read_is_refused_by_name():
    unread = {
        "torch_total_bytes_exact": None,
        "torch_total_mib_linux_low": None,
        "torch_total_mib_windows_wsl": None,
        "smi_total_mib": None,
    }

    with pytest.raises(InputError, match=r"'RTX A5000' has no known total.*size"):
        Gpu.from_card(dict(card_named("RTX A5000")) | unread)


def test_a_card_without_a_torch_total_or_peers_is_refused_by_name():
    alone = dict(card_named("RTX A4500")) | {"vendor_class": "accelerator"}

    with pytest.raises(InputError, match="'RTX A4500' has no known total"):
        Gpu.from_card(alone)


def test_native_bf16_is_the_cards():
    assert not find_gpu("T4").native_bf16
    assert find_gpu("A100").native_bf16


def test_nvidia_cards_have_native_bf16_from_capability_8():
    for gpu, card in zip(gpus(), cards(), strict=True):
        if not card["vendor_class"].endswith("-amd"):
            assert gpu.native_bf16 == (gpu.compute_capability >= (8, 0)), gpu.name


def test_a_card_keeps_what_the_catalog_knows_of_it():
    gpu = find_gpu("A100")

    assert gpu.compute_capability == (8, 0)
    assert gpu.memory_bandwidth_gbps == 2039
    assert gpu.bf16_dense_tflops == 312
    assert gpu.context_bytes == 717 * MIB


def test_ecc_and_rocm_are_said():
    assert any("ECC" in sentence for sentence in find_gpu("A5000").assumptions)
    assert any("gfx942" in sentence for sentence in find_gpu("MI300X").assumptions)


def test_a_given_context_is_taken_as_it_is_and_is_no_assumption():
    gpu = find_gpu("12GB", context_bytes=100 * MIB)

    assert gpu.budget_bytes == 12 * 10**9 - 100 * MIB
    assert not any("context" in sentence for sentence in gpu.assumptions)


@pytest.mark.parametrize("system", ["windows", "WSL"])
@pytest.mark.parametrize("display", [False, True])
def test_windows_has_dedicated_memory_less_a_gib_once(system, display):
    gpu = find_gpu("RTX 3060", os_name=system, display=display)

    assert gpu.capacity_bytes == 12288 * MIB
    assert gpu.budget_bytes == (12288 - 1024 - 256) * MIB
    assert any("spills into host memory" in sentence for sentence in gpu.assumptions)


def test_windows_never_gives_more_than_linux():
    for card in cards():
        on_windows = find_gpu(card["name"], os_name="windows")
        assert on_windows.budget_bytes < find_gpu(card["name"]).budget_bytes


def test_windows_takes_its_share_of_a_size_as_well():
    assert find_gpu("12GB", os_name="windows").reserve_bytes == GIB


def test_an_unknown_system_is_refused():
    assert refusal("12GB", os_name="plan9").startswith("--os: 'plan9' is unknown")


def test_display_keeps_back_a_linux_desktop_beside_the_reserve():
    gpu = find_gpu("12GB", display=True, reserve_bytes=10**9)

    assert gpu.reserve_bytes == 10**9 + 615 * MIB
    assert any("Linux desktop" in sentence for sentence in gpu.assumptions)


@pytest.mark.parametrize("reserve_bytes", [12 * 10**9, 13 * 10**9, 12 * 10**9 - MIB])
def test_a_reserve_that_leaves_nothing_is_refused(reserve_bytes):
    assert refusal("12GB", reserve_bytes=reserve_bytes).startswith("--reserve: ")


def test_negative_bytes_are_refused():
    assert refusal("12GB", reserve_bytes=-1).startswith("--reserve: -1 is negative")
    assert refusal("12GB", context_bytes=-1).startswith("--context: -1 is negative")


def test_a_desktop_that_leaves_nothing_is_refused():
    assert "1.00 GiB kept back" in refusal("1GiB", os_name="windows")


def test_json_is_plain_and_adds_up():
    shown = find_gpu("RTX 3060", reserve_bytes=MIB).to_json()

    assert json.loads(json.dumps(shown)) == shown
    assert shown["compute_capability"] == "8.6"
    assert shown["budget_bytes"] == (11899 - 1 - 256) * MIB
    assert all(
        type(value) is int for key, value in shown.items() if key.endswith("_bytes")
    )


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML code {value}")
        self.value = value


@dataclass
class FakeNvml:
    """Stands in for the module pynvml: one machine's devices, told as NVML tells."""

    name: str = "NVIDIA H100 80GB HBM3"
    total: int = 81559 * MIB
    reserved: int = 477 * MIB
    used: int = 0
    capability: tuple[int, int] = (9, 0)
    count: int = 1
    has_second_version: bool = True
    failures: dict[str, int] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    sessions: int = 0

    NVMLError = NVMLError
    nvmlMemory_v2 = 0x02000028  # noqa: N815 - NVML's own name
    NVML_ERROR_INVALID_ARGUMENT = 2
    NVML_ERROR_NOT_SUPPORTED = 3
    NVML_ERROR_NO_PERMISSION = 4
    NVML_ERROR_NOT_FOUND = 6
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_FUNCTION_NOT_FOUND = 13
    NVML_ERROR_GPU_IS_LOST = 15
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18

    def _fail(self, call: str) -> None:
        if call in self.failures:
            raise NVMLError(self.failures[call])

    def nvmlInit(self) -> None:  # noqa: N802
        self._fail("nvmlInit")
        self.sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.sessions -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self.asked.append(index)
        if index >= self.count:
            raise NVMLError(self.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        self._fail("nvmlDeviceGetHandleByUUID")
        return uuid

    def nvmlDeviceGetName(self, _: object) -> str:  # noqa: N802
        return self.name

    def nvmlDeviceGetCudaComputeCapability(self, _: object):  # noqa: N802
        return self.capability

    def nvmlDeviceGetMemoryInfo(self, _: object, version: int | None = None):  # noqa: N802
        self._fail("nvmlDeviceGetMemoryInfo")
        if version is None:
            return SimpleNamespace(total=self.total, used=self.used + self.reserved)
        if not self.has_second_version:
            raise NVMLError(self.NVML_ERROR_FUNCTION_NOT_FOUND)
        return SimpleNamespace(total=self.total, reserved=self.reserved, used=self.used)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch):
    """A function that makes a FakeNvml this machine's, which runs plain Linux."""
    for variable in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="6.8.0-generic"))

    def put(nvml: Any) -> Any:
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put


def test_auto_reads_the_device_and_adds_what_the_catalog_knows(install):
    nvml = install(FakeNvml(used=1000 * MIB))

    gpu = find_gpu(" Auto ")

    assert gpu.name == "NVIDIA H100 80GB HBM3"
    assert gpu.capacity_bytes == (81559 - 477) * MIB
    assert gpu.reserve_bytes == 1000 * MIB
    assert gpu.context_bytes == 758 * MIB
    assert gpu.compute_capability == (9, 0)
    assert gpu.memory_bandwidth_gbps == 3350
    assert any("other processes" in sentence for sentence in gpu.assumptions)
    assert nvml.asked == [0]
    assert nvml.sessions == 0


@pytest.mark.parametrize(("total_mib", "tflops"), [(8188, 44.1), (16380, 44.1)])
def test_auto_tells_cards_of_one_name_by_their_memory(install, total_mib, tflops):
    install(
        FakeNvml(
            name="NVIDIA GeForce RTX 4060 Ti",
            total=total_mib * MIB,
            reserved=382 * MIB,
            capability=(8, 9),
        )
    )

    gpu = find_gpu("auto")

    assert gpu.bf16_dense_tflops == tflops
    assert gpu.context_bytes == (256 if total_mib < 12288 else 410) * MIB


def test_auto_knows_a_device_that_is_in_no_catalog_by_its_size(install):
    install(FakeNvml(name="NVIDIA Q8", total=8 * GIB, capability=(7, 5)))

    gpu = find_gpu("auto")

    assert gpu.capacity_bytes == 8 * GIB - 477 * MIB
    assert gpu.context_bytes == 256 * MIB
    assert gpu.memory_bandwidth_gbps is None
    assert not gpu.native_bf16


def test_auto_takes_no_card_of_the_same_name_with_other_memory(install):
    install(FakeNvml(name="NVIDIA GeForce RTX 3060", total=8 * GIB, capability=(8, 6)))

    assert find_gpu("auto").memory_bandwidth_gbps is None


def test_auto_on_an_old_driver_keeps_back_all_that_is_used(install):
    install(FakeNvml(used=100 * MIB, has_second_version=False))

    gpu = find_gpu("auto")

    assert gpu.capacity_bytes == 81559 * MIB
    assert gpu.reserve_bytes == (477 + 100) * MIB


def test_auto_counts_a_desktop_once(install):
    install(FakeNvml(used=1000 * MIB))
    assert find_gpu("auto", display=True).reserve_bytes == 1000 * MIB

    install(FakeNvml(used=100 * MIB))
    assert find_gpu("auto", display=True).reserve_bytes == 615 * MIB


def test_auto_under_wsl_keeps_back_the_windows_share(install, monkeypatch):
    install(FakeNvml(used=500 * MIB))
    kernel = SimpleNamespace(release="5.15.167.4-microsoft-standard-WSL2")
    monkeypatch.setattr(os, "uname", lambda: kernel)

    gpu = find_gpu("auto", reserve_bytes=MIB)

    assert gpu.reserve_bytes == GIB + MIB
    assert any("spills into host memory" in sentence for sentence in gpu.assumptions)


@pytest.mark.parametrize(
    ("visible", "asked"), [("1", 1), ("1,0", 1), ("GPU-8f3c", "GPU-8f3c")]
)
def test_auto_takes_the_first_device_that_cuda_may_see(
    install, monkeypatch, visible, asked
):
    nvml = install(FakeNvml(count=2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    find_gpu("auto")

    assert nvml.asked == [asked]


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "99999999999"])
def test_auto_without_a_visible_device_is_refused(install, monkeypatch, visible):
    install(FakeNvml())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    message = refusal("auto")

    assert message.startswith("CUDA_VISIBLE_DEVICES: ")
    assert "12GB" in message


def test_auto_says_in_which_order_it_counted(install, monkeypatch):
    install(FakeNvml(count=2))
    assert any("PCI order" in sentence for sentence in find_gpu("auto").assumptions)

    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert not any("PCI order" in each for each in find_gpu("auto").assumptions)


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ("nvmlInit", 12, "no NVIDIA driver"),
        ("nvmlInit", 9, "not loaded"),
        ("nvmlInit", 18, "different versions"),
        ("nvmlDeviceGetMemoryInfo", 3, "does not tell its memory"),
        ("nvmlDeviceGetMemoryInfo", 999, "NVML code 999"),
    ],
)
def test_nvml_errors_say_the_way_out(install, call, code, words):
    nvml = install(FakeNvml(failures={call: code}))

    message = refusal("auto")

    assert words in message
    assert "give a card of the catalog, or a size such as 12GB" in message
    assert nvml.sessions == 0


def test_auto_without_devices_is_refused(install):
    install(FakeNvml(count=0))

    assert "no such device" in refusal("auto")


def test_auto_without_nvidia_ml_py_says_what_to_install(install):
    install(None)

    assert "pip install nvidia-ml-py" in refusal("auto")


def test_a_full_device_is_refused(install):
    install(FakeNvml(used=81000 * MIB))

    assert "leaves nothing to train in" in refusal("auto")


def test_looking_up_a_card_imports_neither_torch_nor_numpy_nor_nvml():
    code = (
        "import sys; from memplan.gpu import find_gpu; find_gpu('3060');"
        "print(sorted({'torch', 'numpy', 'pynvml'} & sys.modules.keys()))"
    )

    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )

    assert result.stdout == "[]\n"


def gpu_or_refusal(text: str, **options: Any) -> Gpu | InputError:
    try:
        return find_gpu(text, **options)
    except InputError as error:
        return error


def is_auto(text: str) -> bool:
    return text.strip().casefold() == "auto"


@settings(deadline=None)
@given(st.text(max_size=40).filter(lambda text: not is_auto(text)))
def test_any_text_is_a_gpu_or_a_refusal(text):
    assert isinstance(gpu_or_refusal(text), Gpu | InputError)


FRAGMENTS = [
    "RTX",
    "nvidia ",
    "30",
    "4060",
    " Ti",
    "GB",
    "-",
    "_",
    "12",
    "A100",
    ".",
    "(",
]


@settings(deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join))
def test_any_mixture_of_name_parts_is_a_gpu_or_a_refusal(text):
    assert isinstance(gpu_or_refusal(text), Gpu | InputError)


@settings(deadline=None)
@given(
    card=st.sampled_from(cards()),
    words=st.sets(st.sampled_from(["NVIDIA ", "geforce-", "Tesla_"])),
    gap=st.sampled_from(["", " ", "-", "_", "  "]),
    upper=st.booleans(),
)
def test_a_mangled_name_finds_its_card(card, words, gap, upper):
    text = "".join(sorted(words)) + re.sub(r"[ _-]", gap, card["name"])

    assert find_gpu(text.upper() if upper else text.lower()).name == card["name"]


@settings(max_examples=60, deadline=None)
@given(
    mebibytes=st.integers(min_value=1, max_value=10**6),
    reserve_bytes=st.integers(min_value=0, max_value=10**11),
    display=st.booleans(),
    os_name=st.sampled_from([None, "linux", "windows", "wsl"]),
)
def test_a_size_adds_up_or_is_refused(mebibytes, reserve_bytes, display, os_name):
    gpu = gpu_or_refusal(
        f"{mebibytes}MiB", reserve_bytes=reserve_bytes, display=display, os_name=os_name
    )

    if isinstance(gpu, Gpu):
        assert gpu.capacity_bytes == mebibytes * MIB
        assert gpu.reserve_bytes >= reserve_bytes
        assert 0 < gpu.budget_bytes < gpu.capacity_bytes - reserve_bytes
    else:
        assert mebibytes * MIB <= reserve_bytes + (1024 + 717) * MIB
