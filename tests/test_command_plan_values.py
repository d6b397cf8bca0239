"""`memplan plan` by what is measured of a checkpoint's layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import transformers
from command_line import run

from memplan.catalog import inspect
from memplan.planner.modules import adapted_linears
from memplan.recipe import Recipe
from memplan.reporters.schema import plan_schema
from memplan.training.weight_error import squared_error
from memplan.values import Values, read_values

CONFIG = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WORDS = tuple("abcdefghijklmnopqrstuvwxyz")
SETTLED = ("--loss", "full", "--optimizer", "adamw", "--min-seq", "16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small Llama with random weights and a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    letters = models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="a")
    tokenizer = Tokenizer(letters)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def measured(
    checkpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The plan by measured values, and their file."""
    folder = tmp_path_factory.mktemp("values")
    texts = folder / "texts.txt"
    texts.write_text("\n".join(" ".join(WORDS[n : n + 20]) for n in range(6)))
    kept = folder / "kept.json"
    ran = run(
        *("plan", checkpoint, "--gpu", "RTX 3060", *SETTLED, "--json"),
        *("--data", str(texts), "--values", str(kept), "--quantization", "nf4-double"),
        *("--bits", "--effective-batch", "2"),
    )
    assert ran.code == 0, ran.err
    return json.loads(ran.out), kept


def test_values_are_kept_of_every_layer_that_is_adapted(
    checkpoint: str, measured: tuple[dict[str, Any], Path]
) -> None:
    values = read_values(str(measured[1]))
    paths = [*adapted_linears(inspect(checkpoint), Recipe())]

    assert [*values.spectra] == paths == [*values.errors]
    for shares in values.spectra.values():
        assert list(shares) == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert Values.from_json(values.to_json()) == values


def test_errors_are_those_of_the_checkpoint_s_weights(
    checkpoint: str, measured: tuple[dict[str, Any], Path]
) -> None:
    values = read_values(str(measured[1]))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    recipe = Recipe(quantization="nf4-double")
    path = "model.layers.1.mlp.down_proj"

    weight = loaded.get_submodule(path).weight

    assert values.errors[path] == pytest.approx(squared_error(weight, recipe))
    # NF4 loses near 0.9 % of a normal weight's square.
    share = values.errors[path] / float(weight.detach().float().square().sum())
    assert share == pytest.approx(0.009, rel=0.2)


def test_plan_goes_by_the_values_and_names_their_file(
    measured: tuple[dict[str, Any], Path],
) -> None:
    plan, kept = measured

    jsonschema.validate(plan, plan_schema())
    assert (plan["plan"]["prior"], plan["plan"]["tier"]) == ("explained-variance", "T2")
    assert any(str(kept) in note for note in plan["notes"])
    assert any("lost to equal ones" in note for note in plan["notes"])


def test_memory_that_is_left_spares_every_layer(
    checkpoint: str, measured: tuple[dict[str, Any], Path]
) -> None:
    plan, _ = measured
    paths = {*adapted_linears(inspect(checkpoint), Recipe())}

    assert paths <= {*plan["recipe"]["unquantized_modules"]}
    assert "14 of 14 layers stay unquantised" in " ".join(plan["plan"]["reasons"])
    assert plan["plan"]["verified_by"] == "simulation"
    assert plan["fits"] is True


def test_values_are_read_again(
    checkpoint: str, measured: tuple[dict[str, Any], Path]
) -> None:
    ran = run(
        *("plan", checkpoint, "--gpu", "RTX 3060", *SETTLED, "--json"),
        *("--values", str(measured[1]), "--prior", "mlp-first"),
    )

    assert ran.code == 0
    assert json.loads(ran.out)["plan"]["prior"] == "mlp-first"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits"], "--bits"),
        (["--prior", "explained-variance"], "needs values"),
        (["--values", "missing.json"], "cannot be read"),
        (["--data", "missing.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_valued_is_refused(
    checkpoint: str, arguments: list[str], message: str
) -> None:
    ran = run("plan", checkpoint, "--gpu", "12GB", *arguments)

    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err


def test_values_of_another_model_are_refused(
    measured: tuple[dict[str, Any], Path],
) -> None:
    ran = run(
        *("plan", "meta-llama/Llama-3.2-1B", "--gpu", "12GB", *SETTLED),
        *("--values", str(measured[1])),
    )

    assert ran.code == 2
    assert "say nothing" in ran.err


@pytest.mark.parametrize("held", ["[]", '{"kind": "plan", "schema": 1}', '{"kind": 1}'])
def test_what_are_no_values_is_refused(held: str, tmp_path: Path) -> None:
    file = tmp_path / "values.json"
    file.write_text(held)

    ran = run("plan", "gpt2", "--gpu", "12GB", "--values", str(file))

    assert (ran.code, ran.out) == (2, "")
    assert "holds no values" in ran.err
