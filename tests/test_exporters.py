"""Exports: what each trainer's own code makes of them, and nothing half-written."""

from __future__ import annotations

import ast
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import peft
import pytest
import torch
import yaml
from command_line import run
from tiny_models import CONFIGS, architecture
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from memplan import exporters
from memplan.architecture import Architecture
from memplan.errors import InputError, UnknownNameError
from memplan.exporters import Task, export, trl
from memplan.planner.modules import adapted_linears, with_ranks
from memplan.recipe import Recipe, presets
from memplan.reporters.schema import output_schema
from memplan.training import installed

SCHEMAS = Path(__file__).parent / "trainer_schemas"
TRAINERS = exporters.names()
PEAK = {
    "moment": "1.backward",
    "allocated_bytes": 2**30,
    "reserved_bytes": 2**31,
    "device_bytes": 3 * 2**30,
}
PRESETS = {"trl": presets("trl", "none"), "axolotl": {}, "llama-factory": {}}


def ranked(recipe: Recipe, family: str = "llama") -> Recipe:
    """The recipe with three different ranks."""
    linears = adapted_linears(architecture(family), recipe)
    return with_ranks(recipe, {p: 2 + 2 * (i % 3) for i, p in enumerate(linears)})


def task(recipe: Recipe, family: str = "llama", **keys: Any) -> Task:
    made = {
        "model": "tiny/llama",
        "architecture": architecture(family),
        "recipe": recipe,
        "hash": "0123456789abcdef",
        "predicted": PEAK,
        "predicted_by": "simulation",
        "card": "RTX 3060",
    }
    return Task(**made | keys)


def small(**keys: Any) -> Recipe:
    return ranked(Recipe(**{"rank": 4, "sequence_length": 16, "batch_size": 2} | keys))


def text_of(folder: Path, trainer: str) -> str:
    names = {"peft": "README.md", "trl": "train.py", "axolotl": "config.yaml"}
    return (folder / names.get(trainer, "train.yaml")).read_text()


def test_there_is_an_exporter_a_file() -> None:
    assert TRAINERS == ("axolotl", "llama-factory", "peft", "trl")
    for name in TRAINERS:
        assert exporters.find(name).summary


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_file_says_what_it_is_and_what_was_checked(
    trainer: str, tmp_path: Path
) -> None:
    written, statement = export(task(small()), trainer, tmp_path / "out")

    said = text_of(tmp_path / "out", trainer)
    assert all(path.exists() for path in written)
    assert "memplan 0.1.0 from plan 0123456789abcdef" in said
    assert "Predicted peak (RTX 3060): 3.00 GiB on the device, 2.00 GiB" in said
    for sentence in statement.verified:
        assert f"Verified: {sentence}" in said
    for sentence in statement.unverified:
        assert f"NOT verified: {sentence}" in said
    assert any("planned rank" in sentence for sentence in statement.verified)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_peft_loads_the_planned_ranks(method: str, family: str, tmp_path: Path) -> None:
    recipe = ranked(Recipe(method=method, rank=4), family)

    export(task(recipe, family), "peft", tmp_path)

    config = peft.LoraConfig.from_pretrained(str(tmp_path))
    shape = CONFIGS[family] | {"model_type": family}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    adapted = peft.get_peft_model(model, config)
    found = {
        path.removeprefix("base_model.model."): module.r["default"]
        for path, module in adapted.named_modules()
        if hasattr(module, "lora_A") and len(module.r)
    }
    linears = adapted_linears(architecture(family), recipe)
    assert found == {path: 2 + 2 * (i % 3) for i, path in enumerate(linears)}
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trained == sum(
        rank * (linears[path].in_features + linears[path].out_features)
        + (linears[path].out_features if method == "dora" else 0)
        for path, rank in found.items()
    )


def test_quantised_recipe_is_verified_on_quantised_layers(tmp_path: Path) -> None:
    _, statement = export(task(small(quantization="nf4-double")), "peft", tmp_path)

    assert "14 modules" in statement.verified[0]


def test_what_peft_would_install_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = installed.of_config

    def fewer(made: Architecture, recipe: Recipe, config: dict[str, Any]) -> Any:
        return honest(made, recipe, config | {"rank_pattern": {}})

    monkeypatch.setattr(installed, "of_config", fewer)

    with pytest.raises(InputError, match=r"rank 2 at \S+ where 4 is planned"):
        export(task(small()), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_key_that_matches_nothing_is_found() -> None:
    config = {"rank_pattern": {"q_proj": 2, "base_model.model.x": 3}}

    found = installed.unmatched_keys(config | {"alpha_pattern": {}}, ["a.q_proj"])

    assert found == ["base_model.model.x"]


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer of bytes, and lines to train on."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    shape = CONFIGS["llama"] | {"model_type": "llama", "vocab_size": 300}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    lines = [json.dumps({"text": f"line {i} of a few lines"}) for i in range(8)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_trl_s_script_runs_a_step(
    method: str, saved_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"trainer": "trl", "checkpointing": "full"}
    recipe = small(**keys) if method == "lora" else Recipe(method="full", **keys)
    export(task(recipe, model=str(saved_model)), "trl", tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    script = (tmp_path / "train.py").read_text()
    output = tmp_path / "output"
    data = str(saved_model / "data.jsonl")
    arguments = ["train.py", "--data", data, "--output", str(output), "--max-steps=1"]
    monkeypatch.setattr(sys, "argv", arguments)
    with contextlib.redirect_stdout(sys.stderr):
        exec(compile(script, "train.py", "exec"), {"__name__": "__main__"})

    if method == "lora":
        trained = peft.LoraConfig.from_pretrained(str(output))
        assert trained.rank_pattern == dict(recipe.rank_pattern)
        assert trained.alpha_pattern == dict(recipe.alpha_pattern)
    else:
        assert (output / "model.safetensors").exists()


def test_trl_s_arguments_are_sft_config_s(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    recipe = small(
        trainer="trl",
        quantization="nf4-double",
        checkpointing="full",
        every_n_layers=2,
        accumulation=4,
        optimizer="paged-adamw-8bit",
        unquantized_modules=["lm_head", "down_proj"],
    )

    made = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, **trl.train_arguments(recipe)
    )

    assert (made.max_length, made.per_device_train_batch_size) == (16, 2)
    assert made.activation_checkpointing_kwargs["every_n_layers"] == 2
    assert made.optim == "paged_adamw_8bit"
    keys = exporters.trl.quantization_keys(recipe)
    quantised = BitsAndBytesConfig(**keys)
    assert quantised.bnb_4bit_quant_type == "nf4"
    assert quantised.llm_int8_skip_modules == ["lm_head", "down_proj"]


def test_trl_before_the_new_names_gets_the_old_ones() -> None:
    recipe = Recipe(trainer="trl", checkpointing="full")

    old = trl.train_arguments(recipe, transformers="5.22.1")
    new = trl.train_arguments(recipe, transformers="5.23.0")

    assert old["gradient_checkpointing"] is True
    assert new["activation_checkpointing"] is True
    assert "gradient_checkpointing" not in new
    with pytest.raises(InputError, match="every_n_layers"):
        trl.train_arguments(
            Recipe(checkpointing="full", every_n_layers=2), transformers="5.22.1"
        )


@pytest.mark.parametrize(
    "keys",
    [
        {"quantization": "int8"},
        {"quantization": "nf4", "kbit_prepare": True, "checkpointing": "full"},
        {"method": "full"},
        {"targets": ["q_proj"], "trained_modules": ["embed_tokens"]},
    ],
)
def test_every_script_is_python(keys: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(**{"trainer": "trl"} | keys)

    export(task(recipe), "trl", tmp_path)

    script = (tmp_path / "train.py").read_text()
    ast.parse(script)
    assert ("prepare_model_for_kbit_training" in script) == ("kbit_prepare" in keys)


def test_what_a_trainer_does_otherwise_is_said(tmp_path: Path) -> None:
    export(task(small()), "trl", tmp_path)

    said = (tmp_path / "train.py").read_text()
    assert "The plan has loss full, and this trainer chunked" in said
    export(task(small(trainer="trl")), "trl", tmp_path)
    assert "The plan has" not in (tmp_path / "train.py").read_text()


QLORA = {"quantization": "nf4-double", "checkpointing": "full"}


@pytest.mark.parametrize("keys", [{}, QLORA, {"method": "full"}, {"method": "dora"}])
@pytest.mark.parametrize(
    ("trainer", "file"),
    [("axolotl", "config.yaml"), ("llama-factory", "train.yaml")],
)
def test_yaml_holds_to_the_trainer_s_published_schema(
    trainer: str, file: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    recipe = Recipe(**keys) if keys.get("method") == "full" else small(**keys)
    export(task(recipe), trainer, tmp_path)

    written = yaml.safe_load((tmp_path / file).read_text())

    jsonschema.validate(written, json.loads((SCHEMAS / f"{trainer}.json").read_text()))


def test_axolotl_parses_what_is_written(tmp_path: Path) -> None:
    config = pytest.importorskip("axolotl.utils.schemas.config")
    for index, keys in enumerate([{}, QLORA, {"method": "dora"}]):
        _, statement = export(task(small(**keys)), "axolotl", tmp_path / str(index))

        written = yaml.safe_load((tmp_path / str(index) / "config.yaml").read_text())
        parsed = config.AxolotlInputConfig(**written)
        assert parsed.lora_rank_pattern == dict(small(**keys).rank_pattern)
        assert "axolotl" in statement.verified[-1]


def test_llama_factory_resumes_an_adapter_that_changes_nothing(tmp_path: Path) -> None:
    recipe = small(quantization="nf4")
    export(task(recipe), "llama-factory", tmp_path)

    shape = CONFIGS["llama"] | {"model_type": "llama"}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).eval()
    ids = torch.arange(8)[None]
    before = base(input_ids=ids).logits.detach()
    resumed = peft.PeftModel.from_pretrained(
        base, str(tmp_path / "plan_adapter"), is_trainable=True
    )

    assert torch.equal(resumed(input_ids=ids).logits, before)
    linears = adapted_linears(architecture("llama"), recipe)
    for index, path in enumerate(linears):
        module = resumed.get_submodule(f"base_model.model.{path}")
        weight = module.lora_A["default"].weight
        assert module.r["default"] == 2 + 2 * (index % 3)
        assert weight.requires_grad
        assert 0 < weight.abs().max() <= linears[path].in_features ** -0.5


@pytest.mark.parametrize(
    ("trainer", "keys", "message"),
    [
        ("peft", {"method": "full"}, "method"),
        ("trl", {"optimizer": "adamw-loop"}, "optimizer"),
        ("axolotl", {"loss": "chunked"}, "loss"),
        ("axolotl", {"quantization": "int8"}, "quantization"),
        ("axolotl", {"alpha": 0.5}, "alpha"),
        ("llama-factory", {"checkpointing": "full", "every_n_layers": 2}, "every_n"),
    ],
)
def test_what_a_trainer_cannot_run_is_refused_and_nothing_written(
    trainer: str, keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export(task(Recipe(**keys)), trainer, tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match="--out"):
        export(task(small()), "peft", tmp_path / "file" / "out")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_folder_that_exists_keeps_what_else_it_holds(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "README.md").write_text("replaced")

    export(task(small()), "peft", tmp_path)

    assert (tmp_path / "notes.txt").read_text() == "kept"
    assert "memplan" in (tmp_path / "README.md").read_text()
    assert len(list(tmp_path.iterdir())) == 3


def test_command_takes_whatever_memplan_printed(tmp_path: Path) -> None:
    printed = {
        "kind": "simulation",
        "model": "Qwen/Qwen2.5-0.5B",
        "recipe": Recipe(rank=8, targets="attention").to_json(),
        "gpu": None,
        "peak": PEAK | {"device_bytes": None},
    }
    out = tmp_path / "out"

    ran = run(
        *("export", "-", "--to", "peft", "--out", str(out), "--json"),
        stdin=json.dumps(printed),
    )

    assert (ran.code, ran.err) == (0, "")
    said = json.loads(ran.out)
    jsonschema.validate(said, output_schema())
    assert said["files"] == [str(out / f) for f in ("README.md", "adapter_config.json")]
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 8
    assert "2.00 GiB reserved" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "pefft"], "peft"),
        (["--to", "peft"], "MODEL"),
        (["--to", "peft", "--model", "Qwen/Qwen2.5-0.6B"], "Qwen/Qwen2.5-0.5B"),
    ],
)
def test_command_refuses_in_a_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = tmp_path / "recipe.yaml"
    file.write_text("rank: 8\n")

    ran = run("export", str(file), *arguments, "--out", str(tmp_path / "out"))

    assert (ran.code, ran.out) == (2, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


def test_unknown_exporter_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="axolotl"):
        exporters.find("axolotll")
