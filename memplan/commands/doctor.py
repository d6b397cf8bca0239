"""`memplan doctor`: what this machine has and lacks, and its card's real context."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click

from memplan import machine
from memplan.commands.options import json_option
from memplan.errors import InputError, MeasurementError
from memplan.gpu import Gpu, find_gpu
from memplan.machine import Reading
from memplan.profile import Profile
from memplan.recipe import Recipe
from memplan.reporters import json, terminal
from memplan.units import format_bytes

MODEL: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 1024,
}
"""A small model that loads the kernels of any other: 83 M parameters."""

PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl")

NEEDED = ("torch", "transformers", "peft", "accelerate")
"""Those without which nothing runs, so that nothing can be measured."""

USES = {
    "torch": "simulate, profile and models outside of the catalog",
    "transformers": "simulate, profile and models outside of the catalog",
    "peft": "simulating and measuring any method but full",
    "accelerate": "measuring",
    "bitsandbytes": "quantised bases and 8-bit optimizers",
    "trl": "measuring SFTTrainer's own loop",
}
"""What each package is for."""

STEPS = 3


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Measure this machine's card, once, and say what is missing.

    A small model takes a few real steps, and the card's capacity and CUDA context are
    kept in the user's folder.
    Without a card, or without the libraries, there is nothing to measure.
    """
    missing = tuple(_missing())
    reading: Reading | None = None
    file: str | None = None
    notes: tuple[str, ...] = ()
    card, without_card = _find_card()
    if card is not None and not any(one.stops for one in missing):
        with terminal.progress(f"Measuring {card.name}", quiet=as_json) as told:
            run = _measure(told)
        reading, notes = reading_of(run), run.notes
        file = str(machine.keep(reading))
    if as_json:
        told_missing = {one.name: one.remedy for one in (*missing, *without_card)}
        json.print_machine(reading, file, told_missing)
        return
    _report(card, reading, (*missing, *without_card))
    for note in notes:
        terminal.say(f"Note: {note}", style="dim")
    if file is not None:
        terminal.say(f"Kept in {file}; every prediction for this card uses it.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """What this machine lacks, and how to get it."""

    name: str
    remedy: str
    """What it is good for, and what brings it."""
    stops: bool
    """Whether nothing can be measured without it."""


def _missing() -> Iterator[Missing]:
    """The packages that are not installed."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            yield Missing(
                name=package,
                remedy=f"{USES[package]}: pip install 'memplan[torch]'"
                if package != "trl"
                else f"{USES[package]}: pip install trl",
                stops=package in NEEDED,
            )


def _find_card() -> tuple[Gpu | None, tuple[Missing, ...]]:
    """This machine's card; else why there is none."""
    try:
        return find_gpu("auto"), ()
    except InputError as error:
        remedy = (
            f"measuring on it; predictions need none ({error}). `memplan profile "
            "--device cpu` measures the bytes of tensors"
        )
        return None, (Missing(name="card", remedy=remedy, stops=True),)


def _report(
    card: Gpu | None, reading: Reading | None, missing: tuple[Missing, ...]
) -> None:
    versions = json.versions()
    rows = [("memplan", versions["memplan"]), ("Python", platform.python_version())]
    rows += [(package, versions.get(package, "missing")) for package in PACKAGES]
    if reading is not None:
        rows += [
            ("card", reading.card),
            ("capacity", format_bytes(reading.capacity_bytes)),
            ("CUDA context", format_bytes(reading.context_bytes)),
            ("driver", reading.driver or "not told"),
        ]
    else:
        rows.append(("card", "none was found" if card is None else card.name))
    terminal.table(("of this machine", ""), rows, wraps=("",))
    for one in missing:
        terminal.say(f"Missing: {one.name}, for {one.remedy}.")
    if not missing:
        terminal.say("Nothing is missing.")


def reading_of(run: Profile) -> Reading:
    """What a run says of its card; raises MeasurementError where that is too little."""
    if not run.has_measured or run.footprint is None or run.gpu is None:
        raise MeasurementError(
            f"{run.outcome}: {run.message or 'nothing was measured'}"
        )
    context_bytes = run.footprint.context_bytes
    if context_bytes is None:
        raise MeasurementError(
            "the driver does not tell what this process takes: "
            + " ".join(run.notes or ("NVML gave no reading",))
        )
    return Reading(
        card=run.gpu.name,
        driver=run.environment.get("driver", ""),
        torch=run.environment.get("torch", ""),
        capacity_bytes=run.gpu.capacity_bytes,
        context_bytes=context_bytes,
        measured_at=run.measured_at,
    )


def _measure(progress: Any) -> Profile:
    from memplan import profiler
    from memplan.profiler.task import Task

    task = Task(
        model="doctor",
        config=MODEL,
        recipe=Recipe(batch_size=2, autocast="bfloat16", max_grad_norm=1.0),
        device="cuda",
        steps=STEPS,
    )
    return profiler.run_task(task, "doctor", progress=progress)
