"""`memplan explain`: why a measured run differs from its prediction."""

from __future__ import annotations

from pathlib import Path

import click

from memplan import accuracy, runs
from memplan.commands.options import (
    json_option,
    runs_folder_option,
    without_compiler,
)
from memplan.profile import Profile
from memplan.reporters import accuracy as reporter
from memplan.reporters import json, terminal


@click.command()
@click.argument("name", metavar="RUN")
@runs_folder_option
@json_option
def command(name: str, folder: str, as_json: bool) -> None:
    """Show why a measured run differs from its prediction.

    Measured minus predicted, term by term, and what would explain it.

    RUN is a run's file, or the name of one: see `memplan runs`.
    """
    run = find_run(name, Path(folder))
    ways = accuracy.predictors_of(run, json.versions())
    title = f"Explaining {run.id}"
    with terminal.progress(title, quiet=as_json) as told, without_compiler():
        found = [
            accuracy.explain(run, way, predict, told) for way, predict in ways.items()
        ]
    if as_json:
        json.print_explanations(run, found)
        return
    for one in found:
        reporter.report_explanation(run, one)


def find_run(name: str, folder: Path) -> Profile:
    """The run in a file, or of a name; raises InputError where there is none."""
    if Path(name).is_file():
        return runs.read(Path(name))
    return runs.find(accuracy.known_runs(folder), name)
