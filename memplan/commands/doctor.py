"""`memplan doctor`: what this machine has, and its card's real context and capacity."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

import click

from memplan import machine
from memplan.commands.options import json_option
from memplan.errors import MeasurementError, MissingExtraError
from memplan.gpu import find_gpu
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

STEPS = 3


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Measure this machine's CUDA context and card, once.

    A small model takes a few real steps, and the figures are kept in the user's folder.
    """
    _check_installed()
    card = find_gpu("auto")
    with terminal.progress(f"Measuring {card.name}", quiet=as_json) as told:
        run = _measure(told)
    reading = reading_of(run)
    file = machine.keep(reading)
    if as_json:
        json.print_machine(reading, str(file))
        return
    terminal.table(
        ("of this machine", ""),
        [
            ("card", reading.card),
            ("capacity", format_bytes(reading.capacity_bytes)),
            ("CUDA context", format_bytes(reading.context_bytes)),
            ("driver", reading.driver or "not told"),
            ("Python", sys.version.partition(" ")[0]),
            *(
                (package, run.environment.get(package, "missing"))
                for package in PACKAGES
            ),
        ],
    )
    for note in run.notes:
        terminal.say(f"Note: {note}", style="dim")
    terminal.say(f"Kept in {file}; every prediction for this card uses it.")


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


def _check_installed() -> None:
    for package in ("torch", "transformers", "peft", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("doctor", package, "torch")
