from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import memplan
from memplan import catalog
from memplan.catalog import (
    CatalogCard,
    architecture_of,
    catalog_cards,
    catalog_models,
    inspect,
)
from memplan.errors import MissingExtraError, UnknownNameError
from memplan.gpu import cards
from memplan.model_source import ModelSource, catalog_names


def test_every_model_is_listed_by_name() -> None:
    names = [model.architecture.name for model in catalog_models()]

    assert sorted(names) == catalog_names()
    assert names == sorted(names, key=str.casefold)


def test_model_tells_its_size_and_its_sources() -> None:
    (llama,) = (
        model.to_json()
        for model in catalog_models()
        if model.architecture.name == "meta-llama/Llama-2-7b-hf"
    )

    facts = llama.pop("facts")
    assert llama == {
        "name": "meta-llama/Llama-2-7b-hf",
        "model_type": "llama",
        "class_name": "LlamaForCausalLM",
        "total_parameters": 6_738_415_616,
        "num_layers": 32,
        "layers_by_stack": {"model.layers": 32},
        "hidden_size": 4096,
        "vocab_size": 32000,
        "max_positions": 2048,
        "num_experts": 0,
        "generative": True,
    }
    assert facts["parameters_published"] == 6_738_415_616
    assert facts["published_source"]
    assert facts["confidence"] == "high"


def test_every_card_is_listed() -> None:
    assert [card.card["name"] for card in catalog_cards()] == [
        card["name"] for card in cards()
    ]


def test_card_without_a_known_total_is_listed_with_a_blank() -> None:
    card = CatalogCard(card=cards()[0], gpu=None)

    listed = card.to_json()

    assert listed["capacity_bytes"] is None
    assert listed["context_bytes"] is None
    assert listed["name"] == cards()[0]["name"]


def test_search_looks_at_names_and_aliases() -> None:
    (t4,) = (card for card in catalog_cards() if card.card["name"] == "Tesla T4")

    assert t4.matches("tesla")
    assert t4.matches("T4")
    assert not t4.matches("A100")


def test_model_of_the_catalog_needs_no_torch() -> None:
    assert inspect("meta-llama/llama-2-7b-hf").total_parameters == 6_738_415_616


def test_inspect_is_what_the_package_offers() -> None:
    assert memplan.inspect is inspect


def test_folder_and_file_are_inspected_alike(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))

    folder, file = inspect(str(tmp_path)), inspect(str(tmp_path / "config.json"))

    # GPT-2 small has 12 layers of 7,087,872 parameters and 124,439,808 in all.
    assert folder.total_parameters == 124_439_808 - 9 * 7_087_872
    assert file.blocks == folder.blocks
    assert file.config == config


def test_entry_without_an_architecture_is_inspected() -> None:
    config = {"model_type": "gpt2", "n_layer": 1}
    source = ModelSource(name="new/entry", origin="catalog", config=config)

    assert architecture_of(source).num_layers == 1


def test_unknown_model_lists_the_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"near: .*Llama-2-7b-hf"):
        inspect("Llama-2-7b")


def test_model_outside_of_the_catalog_names_the_missing_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "memplan.inspector", raising=False)
    monkeypatch.delattr(memplan, "inspector", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    source = ModelSource(name="own/model", origin="file", config={})

    with pytest.raises(MissingExtraError, match=r"pip install 'memplan\[torch\]'"):
        catalog.architecture_of(source)
