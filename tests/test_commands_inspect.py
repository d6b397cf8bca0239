from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run


def test_model_is_shown_by_its_counts_blocks_and_the_rest() -> None:
    ran = run("inspect", "meta-llama/llama-2-7b-hf")

    assert (ran.code, ran.err) == (0, "")
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    for line in (
        "meta-llama/Llama-2-7b-hf: LlamaForCausalLM",
        "attention 2,147,483,648 31.9%",
        "32 x LlamaDecoderLayer in model.layers, 202,383,360 parameters each",
        "self_attn.q_proj attention 4096 -> 4096 16,777,216",
        "mlp.down_proj mlp 11008 -> 4096 45,088,768",
        "lm_head head 4096 -> 32000 131,072,000",
        "model.embed_tokens.weight embedding 32000 x 4096 131,072,000",
    ):
        assert line in lines


def test_headline_has_what_matters_of_this_model() -> None:
    said = run("inspect", "openai-community/gpt2").out.splitlines()[1]

    assert said == (
        "124,439,808 parameters (124.44 M), 12 layers, hidden size 768, vocabulary "
        "50257, positions up to 1024, the head is the input embedding"
    )


def test_towers_and_experts_are_told_in_the_headline() -> None:
    said = run("inspect", "google/gemma-4-26B-A4B").out.splitlines()[1]

    assert "27 + 30 layers, 128 experts" in said


def test_json_is_the_architecture_and_its_counts() -> None:
    ran = run("inspect", "mistralai/Mixtral-8x7B-v0.1", "--json")

    printed = json.loads(ran.out)
    assert printed["model"] == "mistralai/Mixtral-8x7B-v0.1"
    assert printed["parameters"]["total"] == 46_702_792_704
    assert sum(printed["parameters"]["by_kind"].values()) == 46_702_792_704
    assert printed["architecture"]["num_experts"] == 8
    assert any("16 bits" in note for note in printed["notes"])
    assert printed["versions"].keys() >= {"memplan", "torch", "transformers"}


@pytest.mark.parametrize(
    "model",
    [
        "google-bert/bert-base-uncased",
        "google/flan-t5-small",
        "google/vit-base-patch16-224-in21k",
    ],
)
def test_encoder_is_said_to_be_for_inspection_only(model: str) -> None:
    said = "This is no causal language model: memplan can inspect it, and nothing else."

    assert said in run("inspect", model).out
    assert said in json.loads(run("inspect", model, "--json").out)["notes"]
    assert said not in run("inspect", "openai-community/gpt2").out


def test_config_that_names_code_is_said_not_to_have_run_it(tmp_path: Path) -> None:
    config = {"model_type": "gpt2", "n_layer": 1, "auto_map": {"AutoModel": "m.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))

    ran = run("inspect", str(tmp_path))

    assert ran.code == 0
    assert "code of its own (auto_map), which was not run" in ran.out
