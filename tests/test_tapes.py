"""Tapes are read where they are shipped, traced once, and kept for the next time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from memplan import tape, tapes
from memplan.catalog import catalog_models
from memplan.errors import MissingExtraError
from memplan.tape import LayerRegime, LayerTape, Mark, Stretch

TAPE = LayerTape(
    forward=Stretch(net={"No": 2}, peaks=({"No": 2},)),
    passing=Stretch(net={"No": 2}, peaks=({"No": 2},)),
    backward=(Stretch(net={"Ni": 2}, peaks=({"Ni": 2},)), Mark(kind="x")),
    cached={},
    holds_input=True,
    sticks=False,
    stuck={},
    output_dtype="bfloat16",
    kept=({"Nr": 4},),
    ahead={"No": 4},
    again=Stretch(net={"No": 2}, peaks=({"No": 2},)),
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMPLAN_CACHE", str(tmp_path))
    return tmp_path / "tapes"


def find(trace: Any) -> LayerTape:
    return tapes.TapeFile("one", "tapes").find("key", tape.layer_tape, trace)


def never() -> LayerTape:
    raise AssertionError("traced again")


def test_what_was_traced_is_read_the_next_time(cache: Path) -> None:
    assert find(lambda: TAPE) == TAPE
    assert find(never).kept == TAPE.kept


def test_a_broken_file_counts_as_missing(cache: Path) -> None:
    find(lambda: TAPE)
    (file,) = cache.iterdir()
    file.write_bytes(b"\x1f\x8bnot gzip")

    assert find(lambda: TAPE) == TAPE


def test_without_torch_an_untraced_tape_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "memplan.simulator.taping", None)
    monkeypatch.delattr("memplan.simulator.taping", raising=False)
    regime = LayerRegime(
        method="lora",
        quantization="none",
        dtype="float64",
        input_dtype="float64",
        autocast="none",
        compute_dtype="float64",
        adapter_dtype="float64",
        input_casts=True,
        dropout=False,
        bias=False,
    )

    with pytest.raises(MissingExtraError, match=r"memplan\[torch\]"):
        tapes.layer_tape(regime)


def test_every_generative_model_of_the_catalog_ships_its_tapes() -> None:
    missing = [
        (model.architecture.name, kind)
        for model in catalog_models()
        if model.architecture.generative
        for kind in tapes.KINDS
        if not tapes.shipped_path(tapes.name_of(model.architecture), kind).is_file()
    ]

    assert missing == []
