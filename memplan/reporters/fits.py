"""What fits on a card: tables for people, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from memplan.fits import DEFAULTS, Answer, Way
from memplan.gpu import Gpu
from memplan.lengths import Lengths
from memplan.recipe import Recipe
from memplan.reporters import json, terminal
from memplan.units import format_bytes, format_count

COLUMNS = (
    "model",
    "model_type",
    "total_parameters",
    "method",
    "quantization",
    "batch_size",
    "sequence_length",
    "fits",
    "device_bytes",
    "margin_bytes",
    "longest_sequence_length",
    "problem",
)
"""What CSV and Markdown hold of an answer."""


def report(
    answers: Sequence[Answer],
    ways: Sequence[Way],
    gpu: Gpu,
    top: int | None,
    lengths: Lengths | None,
) -> None:
    """Prints for each way the first models that fit; `top` of them, or all."""
    recipe = answers[0].recipe if answers else Recipe()
    terminal.say(_headline(gpu, recipe))
    for way in ways:
        of_way = [answer for answer in answers if answer.way == way]
        _report_way(of_way, way, top, lengths)
    terminal.say(_settings(recipe))


def report_models(answers: Sequence[Answer], gpu: Gpu, lengths: Lengths | None) -> None:
    """Prints every answer on a few models, whether they fit or not."""
    recipe = answers[0].recipe if answers else Recipe()
    terminal.say(_headline(gpu, recipe))
    covered = () if lengths is None else ("samples",)
    for architecture in dict.fromkeys(answer.architecture.name for answer in answers):
        of_model = [one for one in answers if one.architecture.name == architecture]
        count = format_count(of_model[0].architecture.total_parameters)
        terminal.table(
            ("way", "fits", "device", "to spare", "longest", *covered),
            [_way_row(answer, lengths) for answer in of_model],
            right=("device", "to spare", "longest", *covered),
            title=f"\n{architecture}, {count} parameters:",
        )
    for answer in answers:
        if answer.problem:
            name = answer.architecture.name
            terminal.say(f"Note: {name}, {answer.way.name}: {answer.problem}", "dim")
    terminal.say(_settings(recipe))


def report_object(
    gpu: Gpu,
    keys: Mapping[str, Any],
    answers: Sequence[Answer],
    notes: Sequence[str],
    lengths: Lengths | None,
) -> None:
    """Prints the answers as one object; `keys` are the recipe's that were given."""
    body = {
        "gpu": gpu.to_json(),
        "recipe": {**DEFAULTS, **keys},
        "fits": [answer.to_json() for answer in answers],
        "lengths": None if lengths is None else lengths.to_json(),
        "notes": list(notes),
    }
    json.report_object("fits", body)


def as_csv(answers: Sequence[Answer]) -> str:
    """A line of names, then one an answer; bytes are integers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(_cells(answer) for answer in answers)
    return text.getvalue()


def as_markdown(answers: Sequence[Answer]) -> str:
    """A table of an answer a line."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS)]
    lines += [
        tuple(cell.replace("|", "\\|") for cell in _cells(answer)) for answer in answers
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


FORMATS: dict[str, Callable[[Sequence[Answer]], str]] = {
    "csv": as_csv,
    "markdown": as_markdown,
}


def write(answers: Sequence[Answer], form: str) -> None:
    """Prints the answers in a form of FORMATS and nothing else."""
    click.echo(FORMATS[form](answers), nl=False)


def _headline(gpu: Gpu, recipe: Recipe) -> str:
    return (
        f"On {gpu.name}, {format_bytes(gpu.budget_bytes)} for training: batch "
        f"{recipe.batch_size} x {recipe.sequence_length:,} tokens"
    )


def _settings(recipe: Recipe) -> str:
    """What was assumed of the recipe, most of it defaults."""
    checkpointing = "with" if recipe.checkpointing == "full" else "without"
    return (
        f"\nAll {checkpointing} gradient checkpointing, {recipe.dtype}, "
        f"{recipe.optimizer}, adapters of rank {recipe.rank} on {_targets(recipe)}; "
        "options change any of this, and `memplan estimate` has the terms. Longest is "
        "the longest sequence that fits at this batch; *: the model's positions end."
    )


def _targets(recipe: Recipe) -> str:
    targets = recipe.targets
    return targets if isinstance(targets, str) else ", ".join(targets)


def _report_way(
    answers: Sequence[Answer], way: Way, top: int | None, lengths: Lengths | None
) -> None:
    fitting = [answer for answer in answers if answer.fits]
    shown = fitting[:top]
    title = f"\n{way.name}: {len(fitting)} of {len(answers)} models fit"
    unknown = sum(bool(answer.problem) for answer in answers)
    title += f" ({unknown} could not be estimated)" if unknown else ""
    if not fitting:
        terminal.say(f"{title}.", style="bold")
        return
    more = f", the {len(shown)} largest:" if len(shown) < len(fitting) else ":"
    covered = () if lengths is None else ("samples",)
    terminal.table(
        ("model", "parameters", "device", "to spare", "longest", *covered),
        [_row(answer, lengths) for answer in shown],
        right=("parameters", "device", "to spare", "longest", *covered),
        title=title + more,
    )


def _row(answer: Answer, lengths: Lengths | None) -> tuple[str, ...]:
    architecture = answer.architecture
    return (
        architecture.name,
        format_count(architecture.total_parameters),
        _size(answer.device_bytes),
        _size(answer.margin_bytes),
        _longest(answer),
        *_covered(answer, lengths),
    )


def _way_row(answer: Answer, lengths: Lengths | None) -> tuple[str, ...]:
    return (
        answer.way.name,
        "cannot run" if answer.problem else "yes" if answer.fits else "no",
        _size(answer.device_bytes),
        _size(answer.margin_bytes),
        _longest(answer),
        *_covered(answer, lengths),
    )


def _covered(answer: Answer, lengths: Lengths | None) -> tuple[str, ...]:
    """The share of a data set's samples that are no longer than what fits."""
    if lengths is None:
        return ()
    return (f"{lengths.covered(answer.longest_sequence or 0):.1%}",)


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)


def _longest(answer: Answer) -> str:
    """The longest sequence; a star where the model's positions end there."""
    longest = answer.longest_sequence
    if longest is None:
        return "none" if answer.footprint is not None else ""
    ends = longest == answer.architecture.max_positions
    return f"{longest:,}{'*' if ends else ''}"


def _cells(answer: Answer) -> tuple[str, ...]:
    entry = answer.to_json() | {"device_bytes": answer.device_bytes}
    return tuple(_cell(entry[column]) for column in COLUMNS)


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)
