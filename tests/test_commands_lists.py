"""`memplan models` and `memplan gpus`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from command_line import run

from memplan.catalog import CatalogCard
from memplan.gpu import cards
from memplan.model_source import catalog_names


def listed(*arguments: str) -> list[dict[str, Any]]:
    ran = run(*arguments, "--json")
    assert (ran.code, ran.err) == (0, "")
    entries: list[dict[str, Any]] = json.loads(ran.out)[arguments[0]]
    return entries


def names(*arguments: str) -> list[str]:
    return [entry["name"] for entry in listed(*arguments)]


def test_every_model_is_listed() -> None:
    assert sorted(names("models")) == catalog_names()


def test_search_ignores_case() -> None:
    assert names("models", "TINYLLAMA") == ["TinyLlama/TinyLlama-1.1B-Chat-v1.0"]


def test_family_is_a_filter() -> None:
    found = listed("models", "--family", "GPT2")

    assert {model["model_type"] for model in found} == {"gpt2"}
    assert "openai-community/gpt2" in {model["name"] for model in found}


def test_largest_size_is_a_filter() -> None:
    sizes = [
        model["total_parameters"] for model in listed("models", "--max-params", "1B")
    ]

    assert 0 < max(sizes) <= 10**9
    assert len(sizes) < len(catalog_names())


def test_filters_narrow_one_another() -> None:
    found = names("models", "llama-2", "--family", "llama", "--max-params", "7B")

    assert found == ["meta-llama/Llama-2-7b-hf"]


def test_models_are_shown_in_columns() -> None:
    lines = run("models", "llama-2-7b").out.splitlines()

    assert lines[0].split() == [
        *("model", "family", "parameters", "layers", "hidden", "vocabulary")
    ]
    assert lines[1].split() == [
        *("meta-llama/Llama-2-7b-hf", "llama", "6.74", "B", "32", "4096", "32000")
    ]
    assert lines[-1] == "Models: 1."


def test_nothing_found_is_no_error() -> None:
    ran = run("models", "no such model")

    assert (ran.code, ran.err) == (0, "")
    assert ran.out.endswith("Models: 0.\n")
    assert listed("gpus", "no such card") == []


def test_every_card_is_listed() -> None:
    assert names("gpus") == [card["name"] for card in cards()]


def test_cards_are_found_by_alias() -> None:
    assert names("gpus", "4090") == ["GeForce RTX 4090 Laptop", "GeForce RTX 4090"]


def test_smallest_memory_is_a_filter() -> None:
    capacities = [
        card["capacity_bytes"] for card in listed("gpus", "--min-memory", "80GB")
    ]

    assert min(capacities) >= 80 * 10**9


def test_card_tells_what_is_known_and_whence() -> None:
    (card,) = listed("gpus", "rtx 4090")[1:]

    assert card["aliases"]
    assert card["compute_capability"] == "8.9"
    assert card["native_bf16"] is True
    assert card["memory_bandwidth_gbps"] == 1008
    assert card["bf16_dense_tflops"] == 165.2
    assert any("torch" in sentence for sentence in card["assumptions"])


def test_unknown_figures_are_blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No card of the catalog lacks a total, so that one is made."""
    unknown = cards()[0] | {"mem_bandwidth_gbps": None}
    made = (CatalogCard(card=unknown, gpu=None),)
    monkeypatch.setattr("memplan.commands.gpus.catalog_cards", lambda: made)

    ran = run("gpus")

    assert ran.out.splitlines()[1].split() == [
        *(*unknown["name"].split(), unknown["compute_capability"]),
        f"{unknown['bf16_dense_tflops']:g}",
    ]
    assert ran.out.endswith(f"Give a size instead of: {unknown['name']}.\n")
    assert listed("gpus")[0]["capacity_bytes"] is None
    assert listed("gpus", "--min-memory", "1GB") == []
