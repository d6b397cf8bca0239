"""Mutated configs and recipes: a right answer, or exit 2 with one clear sentence."""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import Ran, run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from memplan import inspector
from memplan.commands.options import read_recipe_file
from memplan.errors import InputError
from memplan.model_source import read_catalog, read_config
from memplan.recipe import Recipe, field_names, recipe_schema

FAMILIES = (
    "meta-llama/Llama-2-7b-hf",
    "openai-community/gpt2",
    "mistralai/Mixtral-8x7B-v0.1",
    "openai/gpt-oss-20b",
    "Qwen/Qwen3.5-9B",
    "google/gemma-4-26B-A4B",
    "deepseek-ai/DeepSeek-V2-Lite",
    "tiiuae/falcon-7b",
    "THUDM/chatglm2-6b",
    "microsoft/Phi-3-mini-4k-instruct",
    "google/flan-t5-small",
    "google-bert/bert-base-uncased",
    "google/vit-base-patch16-224-in21k",
)

DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "depth")

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "12", "silu", "no\nsuch", "\ud800", "relu" * 99),
    *(-1, 0, 1, 2, 3, 7, 64, 65536, 2**31 - 1, 2**31, 2**63, 10**40),
    *(0.5, -0.5, 1e300, math.nan, math.inf, -math.inf),
    *([], [1], [0, 8, 16], ["full_attention"], {}, {"a": {"b": [None, {}]}}),
    *({"__float__": "Infinity"}, {"__float__": "x"}, {"model_type": "llama"}),
)

MANY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def shallow(config: dict[str, Any]) -> dict[str, Any]:
    """The config with two layers, so that building it takes no time."""
    config = copy.deepcopy(config)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key in part.keys() & set(DEPTHS):
            part[key] = 2
        part.pop("layer_types", None)
    return config


CONFIGS = [shallow(read_catalog(name).config) for name in FAMILIES]


def assert_clear(ran: Ran) -> None:
    """Holds for bad input: exit 2, nothing on stdout, one sentence on stderr."""
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert ran.err.startswith("memplan: ")
    assert ran.err.count("\n") == 1
    assert len(ran.err) < 1000


@st.composite
def mutated(draw: st.DrawFn, bases: st.SearchStrategy[Any]) -> Any:
    """An object with a few of its values replaced, renamed or left out."""
    mutant = copy.deepcopy(draw(bases))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(_places(mutant)))
        key = draw(st.sampled_from(list(place) or ["extra"]))
        if draw(st.integers(0, 5)):
            place[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
        else:
            value = place.pop(key, None)
            if draw(st.booleans()):
                place[draw(st.sampled_from([f"{key}s", "", key.upper()]))] = value
    return mutant


def _places(value: Any) -> list[dict[str, Any]]:
    """The object and every object within it that can be changed."""
    if not isinstance(value, dict):
        return []
    return [value, *(place for item in value.values() for place in _places(item))]


def inspected(content: bytes) -> Ran:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_bytes(content)
        ran = run("inspect", str(file), "--json")
        if ran.code == 0:
            assert ran.err == ""
            total = json.loads(ran.out)["parameters"]["total"]
            assert total == built_parameters(file)
        else:
            assert_clear(ran)
        return ran


def built_parameters(file: Path) -> int:
    """The parameters of the model itself, each counted once."""
    config = inspector.build_config(read_config(str(file)))
    model = inspector.build_meta_model("built", config)
    return sum(parameter.numel() for parameter in model.parameters())


@settings(MANY, max_examples=500)
@given(config=mutated(st.integers(0, len(CONFIGS) - 1).map(lambda i: CONFIGS[i])))
def test_mutated_config_is_right_or_refused(config: dict[str, Any]) -> None:
    inspected(json.dumps(config).encode())


@settings(MANY, max_examples=100)
@given(
    text=st.sampled_from(CONFIGS[:2]).map(json.dumps),
    cut=st.integers(0, 400),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp037"]),
    prefix=st.sampled_from(
        [b"", b"\xff", b"<html>", b"[", b'{"a":' * 99, b"\0", b"//"]
    ),
)
def test_damaged_file_is_right_or_refused(
    text: str, cut: int, encoding: str, prefix: bytes
) -> None:
    inspected(prefix + text[: len(text) - cut].encode(encoding))


@pytest.mark.parametrize("name", FAMILIES)
def test_configs_that_are_mutated_can_be_inspected(name: str) -> None:
    ran = inspected(json.dumps(CONFIGS[FAMILIES.index(name)]).encode())

    assert ran.code == 0


def recipe_of(content: bytes) -> Recipe | None:
    """The recipe in a file of those bytes; None where the command line refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe")
        file.write_bytes(content)
        try:
            return Recipe.from_mapping(read_recipe_file(str(file))[0])
        except InputError as error:
            sentence = str(error)
        ran = run("simulate", "openai-community/gpt2", "--recipe", str(file))
    assert_clear(ran)
    assert ran.err == f"memplan: {sentence}\n"
    return None


RECIPES = [
    Recipe().to_json(),
    Recipe(trainer="trl", quantization="nf4", rank_pattern={"q_proj": 8}).to_json(),
    {"rank": 8, "targets": ["q_proj", "v_proj"], "method_options": {"lambda": 2}},
]


@settings(MANY, max_examples=400)
@given(
    keys=mutated(st.sampled_from(RECIPES)),
    form=st.sampled_from(["json", "plan", "yaml"]),
)
@example(keys={"rank": 10**400}, form="json")
@example(keys={"alpha": 10**400}, form="json")
@example(keys={"rank_pattern": {"a{99999999999}": 1}}, form="json")
@example(keys={"rank_pattern": {"[[a]": 1}}, form="json")
def test_mutated_recipe_is_right_or_refused(keys: dict[str, Any], form: str) -> None:
    printed = {"schema": 1, "kind": "plan", "model": "gpt2", "recipe": keys}
    text = json.dumps(printed if form == "plan" else keys)
    if form == "yaml":
        text = f"# a recipe\n{text}"
    recipe = recipe_of(text.encode())
    if recipe is None:
        return
    resolved = recipe.to_json()
    jsonschema.validate(resolved, recipe_schema())
    assert list(resolved) == list(field_names())
    assert {key: resolved[key] for key in keys} == keys
    assert Recipe.from_mapping(resolved) == recipe
    json.dumps(resolved, allow_nan=False)


@settings(MANY, max_examples=100)
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(content=b"a: &a [*a]")
@example(content=b"rank: !!python/object:os.system {}")
@example(content=b"{rank: 1, rank: 2}")
@example(content=b"? [a]\n: 1")
@example(content=b"- 1")
@example(content=b"[" * 10**5)
@example(content=b"{a: " * 10**4)
def test_any_bytes_as_recipe_are_right_or_refused(content: bytes) -> None:
    recipe_of(content)


def test_lists_of_lists_of_lists_do_not_fill_the_memory() -> None:
    levels = ["a: &a0 [1, 1]"]
    levels += [f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "recipe")
        file.write_text("\n".join([*levels, "rank: *a39"]))
        keys, _ = read_recipe_file(str(file))

    with pytest.raises(InputError, match=r"rank: \[") as error:
        Recipe.from_mapping({"rank": keys["rank"]})

    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0"),
        ({"vocab_size": 2**40}, "vocab_size: 1099511627776"),
        ({"model_type": "lama"}, "near: llama"),
        ({"model_type": None}, "model_type: None"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"intermediate_size": [1, 2]}, "intermediate_size"),
    ],
)
def test_refusal_names_the_key(change: dict[str, Any], named: str) -> None:
    config = CONFIGS[0] | change

    ran = inspected(json.dumps(config).encode())

    assert ran.code == 2
    assert named in ran.err


def test_experts_without_end_are_refused_or_counted() -> None:
    mixtral = CONFIGS[FAMILIES.index("mistralai/Mixtral-8x7B-v0.1")]

    ran = inspected(json.dumps(mixtral | {"num_local_experts": 10**6}).encode())

    assert ran.code == 0
    # Two layers of a million experts, each of three matrices of 4096 x 14336.
    experts = json.loads(ran.out)["parameters"]["by_kind"]["experts"]
    assert experts == 2 * 10**6 * 3 * 4096 * 14336


def test_modules_without_end_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspector, "LARGEST_NUM_REGISTRATIONS", 50)

    ran = inspected(json.dumps(CONFIGS[1]).encode())

    assert ran.code == 2
    assert "more than 50 modules and parameters" in ran.err


@pytest.mark.parametrize("size", ["12", "0GB", "-1GB", "12XB", "GB", "", "1e9GB"])
def test_bad_size_is_refused(size: str) -> None:
    ran = run("gpus", "--min-memory", size)

    assert_clear(ran)
    assert repr(size) in ran.err


def test_symlink_loop_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "config.json"
    os.symlink(loop, loop)

    assert_clear(run("inspect", str(tmp_path)))
    assert_clear(run("inspect", str(loop)))
