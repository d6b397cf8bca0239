"""`memplan runs`: measured runs, listed, shown, and taken from other people's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from memplan import importers, runs
from memplan.commands.options import json_option, runs_folder_option
from memplan.profile import Profile
from memplan.reporters import json
from memplan.reporters import runs as reporter


@click.group(invoke_without_command=True)
@runs_folder_option
@click.option("--model", help="Keep runs of models whose name holds this.")
@click.option("--card", help="Keep runs on cards whose name holds this.")
@click.option("--method", help="Keep runs of that method.")
@click.option("--quantization", help="Keep runs of that quantisation.")
@click.option("--outcome", help="Keep runs that ended so.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Keep its runs.")
@json_option
@click.pass_context
def command(
    context: click.Context, /, folder: str, as_json: bool, **filters: Any
) -> int:
    """List measured runs, show one, or import others'."""
    context.obj = Path(folder)
    if context.invoked_subcommand is not None:
        return 0
    found = [run for run in runs.load(Path(folder)) if _matches(run, filters)]
    if as_json:
        json.report_list("runs", [reporter.summary(run) for run in found])
    else:
        reporter.report_runs(found)
    return 0


@command.command("show")
@click.argument("name", metavar="ID")
@json_option
@click.pass_obj
def show(folder: Path, name: str, as_json: bool) -> None:
    """Show a run whole; the beginning of its name will do."""
    run = runs.find(runs.load(folder), name)
    if as_json:
        json.print_object(run.to_json())
    else:
        reporter.report_run(run)


@command.command("import")
@click.argument("file", metavar="FILE")
@click.pass_obj
def import_(folder: Path, file: str) -> None:
    """Take the runs of measure_grid.py, t4_runs.json or published.json or .csv."""
    found = importers.read(Path(file))
    runs.prepare(folder)
    for run in found.runs:
        runs.save(run, folder)
    reporter.report_import(found, folder)


def _matches(run: Profile, filters: dict[str, Any]) -> bool:
    """Names are matched by parts, whatever their case; the others whole."""
    parts = {"model": run.model, "card": run.card}
    wholes = {
        "method": run.recipe.method,
        "quantization": run.recipe.quantization,
        "outcome": run.outcome,
        "device": run.device,
    }
    return all(
        (filters[key] or "").casefold() in text.casefold()
        for key, text in parts.items()
    ) and all(filters[key] in (None, text) for key, text in wholes.items())
