"""Every file of the catalog has the keys that profiles/README.md explains."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from memplan.architecture import Architecture
from memplan.store import profiles_path, read_json

ENTRIES = sorted((profiles_path() / "architectures").iterdir())
CARDS = sorted((profiles_path() / "gpus").iterdir())


def explained(title: str) -> list[str]:
    """The keys in the first column of the tables under a title of the README."""
    text = (profiles_path() / "README.md").read_text().split(f"\n## {title}")[1]
    rows = re.findall(r"^\| (`[^|]*`) \|", text.partition("\n## ")[0], re.MULTILINE)
    return [key for row in rows for key in re.findall(r"`(\w+)`", row)]


def of(files: list[Path]) -> Any:
    return pytest.mark.parametrize("file", files, ids=lambda file: file.stem)


@of(ENTRIES)
def test_model_has_the_explained_keys(file: Path) -> None:
    entry = read_json(file)

    assert [*entry, *entry["facts"]] == [
        *("name", "config", "facts", "architecture"),
        *explained("architectures")[4:],
    ]
    assert file.stem == entry["name"].replace("/", "--")
    assert entry["facts"]["confidence"] in ("high", "medium")
    assert entry["facts"]["config_source"]


@of(ENTRIES)
def test_architecture_has_every_field_but_its_identity(file: Path) -> None:
    fields = {field.name for field in dataclasses.fields(Architecture)}

    assert read_json(file)["architecture"].keys() == fields - {"name", "config"}


@of(CARDS)
def test_card_has_the_explained_keys(file: Path) -> None:
    card = read_json(file)

    assert sorted(card) == sorted(explained("gpus"))
    assert card["name"]
    assert card["vendor_class"] in (
        *("consumer", "consumer-laptop", "workstation", "datacentre"),
        "datacentre-amd",
    )


@of(CARDS)
def test_figures_of_a_card_have_their_source(file: Path) -> None:
    card = read_json(file)

    for figure, source in (
        ("smi_total_mib", "smi_source"),
        ("torch_total_mib_linux_low", "torch_source"),
        ("mem_bandwidth_gbps", "bandwidth_source"),
        ("bf16_dense_tflops", "tflops_source"),
        ("cuda_context_mib_observed", "context_source"),
        ("planning_context_mib", "planning_context_source"),
    ):
        if card[figure] is not None:
            assert card[source], figure
