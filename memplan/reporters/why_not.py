"""Why a recipe does not fit, on a terminal and as an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.planner.why_not import Question
from memplan.reporters import terminal
from memplan.reporters.footprint import report_notes
from memplan.units import format_bytes


def answer_of(question: Question) -> dict[str, Any]:
    """The printed object's keys."""
    floor = question.floor
    as_it_is, with_more = question.next_gib()
    return {
        "model": question.architecture.name,
        "recipe": question.recipe.to_json(),
        "gpu": question.gpu.to_json(),
        "fits": question.missing_bytes <= 0,
        "missing_bytes": max(0, question.missing_bytes),
        "floor": {
            "reserved_bytes": floor.life_peak.reserved_bytes,
            "moment": floor.life_peak.label,
            "breakdown": floor.breakdown,
        },
        "fixes": [one.to_json() for one in question.fixes],
        "of_little_help": [one.to_json() for one in question.of_little_help],
        "longest_sequence": as_it_is,
        "longest_sequence_with_a_gib_more": with_more,
        "doubts": [*question.doubts()],
        "notes": [*question.gpu.assumptions, *question.confirmed.notes],
    }


def report(question: Question, answer: Mapping[str, Any]) -> None:
    """Prints the answer."""
    budget = format_bytes(question.gpu.budget_bytes)
    reserved = format_bytes(question.confirmed.life_peak.reserved_bytes)
    verdict = (
        f"Fits: needs {reserved} of {budget}."
        if answer["fits"]
        else f"Does not fit: needs {reserved} of {budget}, "
        f"{format_bytes(answer['missing_bytes'])} more than there is."
    )
    terminal.say(f"{answer['model']} on {question.gpu.name}. {verdict}", style="bold")
    _report_floor(answer["floor"])
    _report_changes("what makes it fit", answer["fixes"])
    if not answer["fits"] and not answer["fixes"]:
        terminal.say("No change of one knob or of two makes it fit; see memplan plan.")
    _report_changes("what hardly helps", answer["of_little_help"])
    terminal.say(_length(answer))
    for doubt in answer["doubts"]:
        terminal.say(doubt)
    report_notes(answer["notes"])


def _report_floor(floor: Mapping[str, Any]) -> None:
    parts = [(name, size) for name, size in floor["breakdown"].items() if size]
    terminal.table(
        (f"at the least, in {floor['moment']}", "bytes"),
        [(name.replace("_", " "), format_bytes(size)) for name, size in parts],
        right=("bytes",),
    )


def _report_changes(title: str, changes: list[Mapping[str, Any]]) -> None:
    if not changes:
        return
    terminal.table(
        (title, "saves", "lacks", "speed"),
        [
            (
                ", ".join(f"{key} {value}" for key, value in one["changes"].items()),
                format_bytes(one["saved_bytes"]),
                format_bytes(one["missing_bytes"]) if one["missing_bytes"] else "",
                f"{one['speed']:.2f}",
            )
            for one in changes
        ],
        right=("saves", "lacks", "speed"),
    )


def _length(answer: Mapping[str, Any]) -> str:
    longest, longer = (
        answer["longest_sequence"],
        answer["longest_sequence_with_a_gib_more"],
    )
    as_it_is = "No sequence fits" if longest is None else f"{longest} tokens fit"
    with_more = "none" if longer is None else f"{longer}"
    return f"{as_it_is}; with one more GiB, {with_more}."
