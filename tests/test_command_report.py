"""`memplan report`: its files, its numbers beside the other commands', its pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from browser import FAINT, WIDTHS, chromium, opened
from command_line import run, run_process

from memplan import accuracy, estimator
from memplan.catalog import inspect
from memplan.footprint import CATEGORIES, Footprint, Moment
from memplan.gpu import find_gpu
from memplan.plan import Plan
from memplan.profile import Profile
from memplan.recipe import Recipe
from memplan.reporters.palette import DARK, LIGHT
from memplan.reporters.schema import output_schema
from memplan.simulation import Simulation
from memplan.units import format_bytes

LLAMA = ("meta-llama/Llama-2-7b-hf", "--quantization", "nf4-double")
CARD = ("--gpu", "RTX 3060")
H100_RUNS = Path(__file__).parents[1] / "profiles" / "runs" / "nvidia-h100-80gb-hbm3"
T4_RUN = "t4-00-qwen2.5-1.5b-instruct-nf4"


def reported(out: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    ran = run("report", *arguments, "--out", str(out), "--json")
    assert (ran.code, ran.err) == (code, "")
    told: dict[str, Any] = json.loads(ran.out)
    jsonschema.validate(told, output_schema())
    assert told["kind"] == "report"
    for file in told["files"]:
        assert Path(file).stat().st_size > 0
    return told


def html_of(told: dict[str, Any]) -> str:
    return Path(told["files"][0]).read_text()


def markdown_of(told: dict[str, Any]) -> str:
    return Path(told["files"][1]).read_text()


def numbers_in(html: str) -> dict[str, Any]:
    (text,) = re.findall(r'id="numbers">(.*?)</script>', html, re.DOTALL)
    found: dict[str, Any] = json.loads(text)
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reported(tmp_path_factory.mktemp("llama"), *LLAMA, *CARD)


def test_verdict_and_numbers_are_the_estimate_s(llama: dict[str, Any]) -> None:
    said = run("estimate", *LLAMA, *CARD).out.splitlines()
    estimate = json.loads(run("estimate", *LLAMA, *CARD, "--json").out)

    assert llama["verdict"] == f"{said[1]}."
    assert f">{llama['verdict']}</p>" in html_of(llama)
    assert f"**{llama['verdict']}**" in markdown_of(llama)
    for key in ("peak", "life_peak", "breakdown", "moments", "terms", "parameters"):
        assert llama["numbers"][key] == estimate[key], key
    assert numbers_in(html_of(llama)) == llama["numbers"]


def closed_form(**keys: Any) -> Footprint:
    """What levers and frontier go by: allocated bytes, without the cache."""
    recipe = Recipe(quantization="nf4-double", **keys)
    return estimator.run(inspect(LLAMA[0]), recipe, find_gpu(CARD[1])).footprint


def test_levers_save_what_estimates_differ_by(llama: dict[str, Any]) -> None:
    levers = llama["numbers"]["levers"]
    saved = [one["saved_bytes"] for one in levers]
    assert len(levers) >= 5
    assert saved == sorted(saved, reverse=True)

    checked = 0
    for one in levers:
        if not one["changes"].keys() <= {"optimizer", "sequence_length"}:
            continue
        before, after = closed_form(), closed_form(**one["changes"])
        assert (
            before.life_peak.reserved_bytes - after.life_peak.reserved_bytes
            == (one["saved_bytes"])
        )
        checked += 1
    assert checked >= 2


def test_the_frontier_is_where_estimates_stop_fitting(llama: dict[str, Any]) -> None:
    for one in llama["numbers"]["frontier"][:3]:
        batch, length = one["batch_size"], one["sequence_length"]
        tried = length or 64
        found = closed_form(batch_size=batch, sequence_length=tried)
        assert found.fits is (length is not None)
        if length is not None and not one["ends"]:
            longer = closed_form(batch_size=batch, sequence_length=length + 64)
            assert longer.fits is False


def test_the_file_needs_nothing_else(llama: dict[str, Any]) -> None:
    html = html_of(llama)

    assert not re.findall(r'(?:src|href)="(?!#|data:)', html)
    assert not re.findall(r"url\((?!#)", html)
    assert "@import" not in html
    assert "<script>" not in html
    assert len(html) < 300_000


def test_every_category_of_the_peak_is_explained(llama: dict[str, Any]) -> None:
    breakdown = llama["numbers"]["breakdown"]
    for name in CATEGORIES:
        if breakdown[name]:
            shown = f"| {name.replace('_', ' ')} | {format_bytes(breakdown[name])} |"
            assert shown in markdown_of(llama)


def test_pictures_are_svg_and_named_in_the_markdown(llama: dict[str, Any]) -> None:
    pictures = [Path(file) for file in llama["files"] if file.endswith(".svg")]

    assert len(pictures) == 5
    for picture in pictures:
        assert ElementTree.parse(picture).getroot().tag.endswith("svg")
        assert f"({picture.parent.name}/{picture.name})" in markdown_of(llama)


def test_the_recipe_and_the_exports_are_there_to_copy(llama: dict[str, Any]) -> None:
    html = html_of(llama)

    assert "quantization: nf4-double" in html
    for name in ("trl: train.py", "peft: adapter_config.json", "axolotl: config.yaml"):
        assert f"<summary>{name}</summary>" in html


def test_the_same_is_written_again_byte_for_byte(
    llama: dict[str, Any], tmp_path: Path
) -> None:
    again = reported(tmp_path, *LLAMA, *CARD)

    assert len(again["files"]) == len(llama["files"])
    for one, other in zip(llama["files"], again["files"], strict=True):
        assert Path(one).read_bytes() == Path(other).read_bytes()


def test_an_estimate_is_reported_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from memplan import cli;"
        f"cli.run(['report', *{LLAMA!r}, *{CARD!r}, '--out', {str(tmp_path)!r}]);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )

    assert done.stdout.splitlines()[-1] == "False"


def test_what_does_not_fit_is_reported_and_exits_with_1(tmp_path: Path) -> None:
    told = reported(tmp_path, *LLAMA, "--gpu", "4GB", code=1)

    assert told["verdict"].startswith("Does not fit on 4GB")
    assert "fits-not" in html_of(told)


def test_without_a_card_the_peak_is_the_verdict(tmp_path: Path) -> None:
    told = reported(tmp_path, "gpt2")

    assert told["verdict"].startswith("Peak ")
    assert (told["fits"], told["numbers"]["levers"]) == (None, [])


def test_a_simulation_has_its_largest_tensors(tmp_path: Path) -> None:
    told = reported(tmp_path, "gpt2", *CARD, "--simulate")
    simulated = json.loads(run("simulate", "gpt2", *CARD, "--json").out)

    assert told["numbers"]["peak"] == simulated["peak"]
    assert told["numbers"]["breakdown"] == simulated["breakdown"]
    sizes = [one["num_bytes"] for one in told["numbers"]["largest"]]
    assert len(sizes) == 12
    assert sizes == sorted(sizes, reverse=True)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A recipe file for each of three ways, as options name them."""
    folder = tmp_path_factory.mktemp("recipes")
    ways = {"full": {"method": "full"}, "lora": {}, "qlora": {"quantization": "nf4"}}
    for name, keys in ways.items():
        (folder / f"{name}.json").write_text(json.dumps(keys))
    return [
        part for name in ways for part in ("--recipe", str(folder / f"{name}.json"))
    ]


def test_several_recipes_are_set_side_by_side(
    recipes: list[str], tmp_path: Path
) -> None:
    asked = ("Qwen/Qwen2.5-1.5B", *recipes, "--gpu", "12GB")
    told = reported(tmp_path, *asked)
    compared = json.loads(run("compare", *asked, "--json").out)

    named = {"name": ""}
    assert [side | named for side in told["numbers"]["sides"]] == [
        side | named for side in compared["sides"]
    ]
    assert told["verdict"].startswith("2 of 3 fit on 12GB: lora, qlora; the smallest")
    for name, side in zip(("full", "lora", "qlora"), compared["sides"], strict=True):
        said = run("estimate", asked[0], "--gpu", "12GB", *options_of(side)).out
        assert f"| {name} | " in markdown_of(told)
        assert f"{said.splitlines()[1]}. |" in markdown_of(told)
    weights = " | ".join(
        format_bytes(side["breakdown"]["weights"]) for side in compared["sides"]
    )
    assert f"| weights | {weights} |" in markdown_of(told)
    assert told["files"][2].endswith("sides.svg")
    assert "method: full" in html_of(told)


def options_of(side: dict[str, Any]) -> tuple[str, ...]:
    recipe = side["recipe"]
    return "--method", recipe["method"], "--quantization", recipe["quantization"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--fits", "--gpu", "12GB"), "are several"),
        (("--validate",), "are several"),
        (("gpt2", "distilgpt2"), "are several"),
        ((), "MODEL: '' is missing"),
    ],
)
def test_recipes_that_cannot_stand_side_by_side(
    recipes: list[str], arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    ran = run("report", *arguments, *recipes, "--out", str(tmp_path / "out"))

    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    asked = ("--gpu", "2GB", "--alternatives", "4", "--quantization", "none", "--json")
    ran = run("plan", "gpt2", *asked)
    assert ran.code == 0, ran.err
    file.write_text(ran.out)
    return file


def test_a_plan_is_reported_with_its_reasons(plan_file: Path, tmp_path: Path) -> None:
    plan = Plan.from_json(json.loads(plan_file.read_text()))
    told = reported(tmp_path, str(plan_file), "--no-simulate")

    assert told["numbers"]["recipe"] == plan.recipe.to_json()
    assert told["numbers"]["peak"] == plan.footprint.peak_json(plan.footprint.peak)
    for reason in plan.reasons:
        assert reason in markdown_of(told)
    assert "front.svg" in markdown_of(told)
    assert plan.hash in html_of(told)


def test_a_run_is_reported_beside_its_prediction(tmp_path: Path) -> None:
    told = reported(tmp_path, T4_RUN, "--no-simulate")
    shown = json.loads(run("runs", "--runs", "nowhere", "--json").out)
    assert shown["runs"] == []

    assert told["numbers"]["kind"] == "measurement"
    assert "| peak, allocated | 6.69 GiB |" in markdown_of(told)
    assert "measured by fitcheck" in markdown_of(told)


def errors_in(markdown: str) -> dict[str, float]:
    """By reading: how far the prediction is from the measured run, in percent."""
    row = r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| ([-+][\d.]+)% \|$"
    found = re.findall(row, markdown, re.MULTILINE)
    return {reading: float(error) for reading, error in found}


@pytest.mark.parametrize(
    "name",
    [
        "tinyllama-1.1b-qlora-r16-b1-s1024-expandable",
        "llama-3.2-1b-inference-lora-merged-none-b4-s512-ac444abff8",
    ],
    ids=["another allocator", "inference"],
)
def test_a_run_is_simulated_as_it_ran(name: str, tmp_path: Path) -> None:
    told = reported(tmp_path, str(H100_RUNS / f"{name}.json"))

    assert abs(errors_in(markdown_of(told))["peak, allocated"]) < 0.02


def test_inference_is_reported_with_the_estimate_s_numbers(tmp_path: Path) -> None:
    asked = (*LLAMA, *CARD, "--inference", "--new-tokens", "32")
    told = reported(tmp_path, *asked)
    estimate = json.loads(run("estimate", *asked, "--json").out)

    assert told["numbers"]["life_peak"] == estimate["life_peak"]
    assert told["numbers"]["inference"] == estimate["inference"]
    markdown = markdown_of(told)
    assert "--inference --new-tokens 32 --adapters separate" in markdown
    assert "memplan export" not in markdown
    assert numbers_in(html_of(told))["life_peak"] == estimate["life_peak"]


def test_a_run_on_a_cpu_is_set_beside_a_cpu_s_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = Profile(
        id="cpu-run",
        source="memplan profile",
        device="cpu",
        model="openai-community/gpt2",
        recipe=Recipe(),
        footprint=Footprint(
            moments=(Moment(label="1.backward", allocated_bytes=1, reserved_bytes=1),)
        ),
        parameters={"total": 2, "trainable": 1},
    )
    cases = []

    def simulated(case: accuracy.Case, versions: object) -> Simulation:
        cases.append(case)
        return Simulation(
            footprint=measured.footprint,
            total_parameters=2,
            trainable_parameters=0,
            peak_blocks=(),
        )

    monkeypatch.setattr(accuracy, "simulated", simulated)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(measured.to_json()))
    told = reported(tmp_path, str(file))

    assert [case.gpu for case in cases] == [None]
    assert "trains 1 of 2 parameters; measured." in markdown_of(told)
    assert errors_in(markdown_of(told))["peak, allocated"] == 0


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return reported(tmp_path_factory.mktemp("fits"), "--fits", "--gpu", "12GB")


def test_fits_has_the_models_that_the_command_says(fits: dict[str, Any]) -> None:
    said = json.loads(run("fits", "--gpu", "12GB", "--json").out)

    assert fits["numbers"]["fits"] == [one for one in said["fits"] if one["fits"]]
    fitting = {one["model"] for one in fits["numbers"]["fits"]}
    assert fits["verdict"].startswith(f"{len(fitting)} of ")


def test_runs_are_set_beside_predictions(tmp_path: Path) -> None:
    """A record of a small run, so that one simulation is enough."""
    from memplan import accuracy, runs

    known = accuracy.known_runs(tmp_path / "none")
    runs.save(next(one for one in known if one.id == T4_RUN), tmp_path / "runs")
    told = reported(tmp_path / "out", "--validate", str(tmp_path / "runs"))

    assert {one["id"] for one in told["numbers"]["runs"]} == {T4_RUN}
    assert told["verdict"].startswith("Of 1 measured runs, 1 have")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fits"], "--gpu: '' is missing"),
        ([], "MODEL: '' is missing"),
        (["gpt2", "distilgpt2"], "are several"),
        (["no-such-model"], "model: 'no-such-model' is unknown"),
        (["gpt2", "--rank", "0"], "rank: 0"),
        (["--validate", "nowhere.json"], "cannot be read"),
        (["--fits", "--inference"], "--inference: True cannot be asked"),
        (["gpt2", "--new-tokens", "8"], "give --inference as well"),
        ([T4_RUN, "--inference"], "leave --gpu, --inference and"),
    ],
)
def test_bad_input_is_said_and_nothing_is_written(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    ran = run("report", *arguments, "--out", str(tmp_path / "out"))

    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    assert not (tmp_path / "out").exists()


def test_a_plan_takes_no_other_recipe(plan_file: Path, tmp_path: Path) -> None:
    ran = run("report", str(plan_file), "--rank", "8", "--out", str(tmp_path))

    assert ran.code == 2
    assert "has a recipe and a card of its own" in ran.err


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = run_process("report", "gpt2", "--out", str(tmp_path / "file" / "out"))

    assert ran.code == 2
    assert "--out" in ran.err


def rgb(colour: str) -> str:
    """A colour as a browser says it."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_the_page_is_whole_in_a_browser(
    browser: Any, llama: dict[str, Any], width: int, scheme: str
) -> None:
    url = Path(llama["files"][0]).as_uri()
    watched = opened(browser, url, width=width, scheme=scheme)
    page = watched.page

    assert (watched.errors, watched.leaving) == ([], [])
    assert page.locator(".verdict").inner_text() == llama["verdict"]
    figures = page.locator("figure svg")
    assert figures.count() == 5
    for box in (figure.bounding_box() for figure in figures.all()):
        assert box["width"] > 0.75 * min(width, 500)
        assert box["height"] > 100
    # Nothing sticks out to the side, so that a phone need not be scrolled that way.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    fills = page.evaluate(
        "[...document.querySelectorAll('figure path')]"
        ".map(path => getComputedStyle(path).fill)"
    )
    assert page.evaluate(FAINT) == []
    theme = {"light": LIGHT, "dark": DARK}[scheme]
    for category in ("weights", "activations", "adapters"):
        assert rgb(theme[category]) in fills
    page.close()


def test_what_is_to_copy_opens_by_keyboard(browser: Any, llama: dict[str, Any]) -> None:
    url = Path(llama["files"][0]).as_uri()
    page = opened(browser, url, width=1280, scheme="light").page
    summary = page.locator("summary", has_text="recipe.yaml")
    summary.focus()
    page.keyboard.press("Enter")

    assert page.locator("details[open] pre").inner_text().startswith("trainer: plain")
    page.close()


def test_a_heat_map_is_drawn_in_a_browser(browser: Any, fits: dict[str, Any]) -> None:
    url = Path(fits["files"][0]).as_uri()
    watched = opened(browser, url, width=390, scheme="dark")

    assert (watched.errors, watched.leaving) == ([], [])
    assert watched.page.locator("figure svg").bounding_box()["height"] > 300
    watched.page.close()
