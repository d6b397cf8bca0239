"""What is documented is there: examples run, and notebooks show what commands say."""

from __future__ import annotations

import doctest
import html
import importlib
import re
import subprocess
import sys

import pytest

import memplan
from memplan.footprint import Footprint
from memplan.units import format_bytes

MODULES = (
    "memplan",
    *sorted({f"memplan.{name}" for name in memplan._MODULES.values()}),
)

EXAMPLES = 9
"""The fewest objects with an example: nouns that are not only results, and verbs."""


def found(module: str) -> list[doctest.DocTest]:
    tests = doctest.DocTestFinder(exclude_empty=True).find(
        importlib.import_module(module)
    )
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module: str) -> None:
    runner = doctest.DocTestRunner()
    for test in found(module):
        runner.run(test)

    assert runner.failures == 0


def test_most_names_have_an_example() -> None:
    assert sum(len(found(module)) for module in MODULES) >= EXAMPLES


@pytest.mark.parametrize("name", memplan.__all__)
def test_names_are_documented(name: str) -> None:
    told = getattr(memplan, name).__doc__

    assert told
    assert told.strip().splitlines()[0].endswith((".", ":"))


def test_importing_loads_nothing_heavy() -> None:
    program = (
        "import sys, memplan; "
        "heavy = {'torch', 'numpy', 'scipy', 'transformers', 'rich', 'matplotlib'}; "
        "assert not heavy & sys.modules.keys(); "
        "assert not [n for n in sys.modules if n.startswith('memplan.')]"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


def footprint(gpu: str | None = "12GB") -> Footprint:
    model = memplan.inspect("meta-llama/Llama-2-7b-hf")
    card = None if gpu is None else memplan.find_gpu(gpu)
    return memplan.estimate(model, memplan.Recipe(quantization="nf4-double"), card)


def test_notebooks_show_every_part_of_the_peak() -> None:
    one = footprint()

    shown = one._repr_html_()
    for name, size in one.breakdown.items():
        assert (f"<td>{format_bytes(size)}</td>" in shown) == (size > 0), name
    assert "<strong>Fits: " in shown
    assert "<script" not in shown
    assert not re.search(r"https?://", shown)


@pytest.mark.parametrize(("gpu", "word"), [("6GB", "Does not fit"), (None, "Peak")])
def test_notebooks_tell_the_verdict(gpu: str | None, word: str) -> None:
    assert f"<strong>{word}" in footprint(gpu)._repr_html_()


def test_notebooks_show_text_as_text() -> None:
    one = memplan.Footprint(
        moments=(memplan.Moment(label="load", allocated_bytes=1, reserved_bytes=1),),
        notes=("a <b> & c",),
    )

    assert html.escape("a <b> & c") in one._repr_html_()


def test_notebooks_show_a_plan() -> None:
    model = memplan.inspect("Qwen/Qwen2.5-0.5B")
    card = memplan.find_gpu("8GB")
    made = memplan.solve(model, memplan.Recipe(), card, verify=False)

    shown = made._repr_html_()
    assert made.model in shown
    assert "<td>method</td><td>lora</td>" in shown
    assert all(html.escape(reason) in shown for reason in made.reasons)
