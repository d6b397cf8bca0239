"""Every method on every kind of base: the estimate beside the simulation.

Two architectures of a few layers, so that neither embedding nor head hides an error;
`python tests/estimator/test_methods_estimated.py` makes reports/accuracy_methods.md.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from memplan import registry, simulator
from memplan.architecture import Architecture
from memplan.catalog import inspect
from memplan.errors import InputError
from memplan.estimator import estimate
from memplan.gpu import find_gpu
from memplan.inspector import inspect as inspect_source
from memplan.model_source import ModelSource
from memplan.recipe import Recipe

REPORT = Path(__file__).parent.parent.parent / "reports" / "accuracy_methods.md"
BOUND = 0.03

MODELS = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": {"num_hidden_layers": 4},
    "openai-community/gpt2": {"n_layer": 4},
}
"""Grouped heads and a gated MLP; biases, Conv1D and a tied head."""

TUNERS = ("MISS", "OFT")
"""PEFT's own, beside the methods that have a file."""

BASES = ("none", "nf4-double", "int8", "hqq-4bit", "quanto-int8", "quanto-int4")


class Case(NamedTuple):
    """A recipe of the table."""

    model: str
    method: str
    options: dict[str, Any]
    quantization: str
    checkpointing: str

    @property
    def name(self) -> str:
        return str(self.options.get("peft_type", self.method))


def cases() -> Iterator[Case]:
    """Every combination, refused ones among them."""
    methods: list[tuple[str, dict[str, Any]]] = [
        (name, {}) for name in registry.names("methods") if name != "peft"
    ]
    methods += [("peft", {"peft_type": name}) for name in TUNERS]
    for model in MODELS:
        for method, options in methods:
            for base in BASES:
                for checkpointing in ("none", "full"):
                    yield Case(model, method, options, base, checkpointing)


@functools.cache
def shallow(model: str) -> Architecture:
    """The model with fewer layers."""
    config = dict(inspect(model).config) | MODELS[model]
    return inspect_source(ModelSource(name=model, origin="file", config=config))


def error_of(case: Case) -> float | None:
    """The estimate's relative error of the allocated peak; None where refused."""
    architecture, card = shallow(case.model), find_gpu("RTX 3060")
    recipe = Recipe(
        method=case.method,
        method_options=case.options,
        quantization=case.quantization,
        checkpointing=case.checkpointing,
        batch_size=2,
    )
    try:
        simulated = simulator.simulate(architecture, recipe, card).peak
        estimated = estimate(architecture, recipe, card).peak
    except InputError:
        return None
    return estimated.allocated_bytes / simulated.allocated_bytes - 1


QUICK = [
    Case(model, method, {}, base, checkpointing)
    for model, method, base, checkpointing in (
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "lora", "quanto-int4", "none"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "qa-hira", "quanto-int8", "full"),
        ("openai-community/gpt2", "ir-qlora", "hqq-4bit", "none"),
        ("openai-community/gpt2", "houlsby", "none", "none"),
    )
]


@pytest.mark.parametrize("case", QUICK)
def test_bases_beside_bitsandbytes_are_estimated(case: Case) -> None:
    error = error_of(case)

    assert error is not None
    assert abs(error) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()))
def test_every_method_is_estimated_within_three_percent(case: Case) -> None:
    error = error_of(case)

    if error is None:
        pytest.skip("refused")
    assert abs(error) <= BOUND


def report() -> str:
    """The table as Markdown: a line a method and model, a column a base."""
    found = {case: error_of(case) for case in map(_hashable, cases())}
    errors = sorted(abs(error) for error in found.values() if error is not None)
    beyond = sum(error > BOUND for error in errors)
    lines = [
        "# The estimate beside the simulation, by method",
        "",
        "Made by `python tests/estimator/test_methods_estimated.py`: the signed error "
        "of the estimate's allocated peak, without and with checkpointing, on models "
        "of 4 layers at batch 2 of 512 tokens. A dash is a base that the method "
        "cannot be trained on.",
        "",
        f"{len(errors)} recipes: median {errors[len(errors) // 2]:.2%}, worst "
        f"{errors[-1]:.2%}, {beyond} beyond {BOUND:.0%}.",
    ]
    for model in MODELS:
        lines += ["", f"## {model}", "", f"| method | {' | '.join(BASES)} |"]
        lines.append(f"|---|{'--:|' * len(BASES)}")
        names = dict.fromkeys(case.name for case in found)
        for name in names:
            cells = [_cell(found, model, name, base) for base in BASES]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _hashable(case: Case) -> Any:
    return case._replace(options=_Options(case.options))


class _Options(dict[str, Any]):
    """Options that can be a part of a key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def _cell(found: dict[Any, float | None], model: str, name: str, base: str) -> str:
    errors = [
        error
        for case, error in found.items()
        if (case.model, case.name, case.quantization) == (model, name, base)
    ]
    shown = ["-" if error is None else f"{error:+.2%}" for error in errors]
    return shown[0] if len(set(shown)) == 1 else " / ".join(shown)


if __name__ == "__main__":
    sys.stdout.write(text := report())
    REPORT.write_text(text, encoding="utf-8")
