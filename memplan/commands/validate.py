"""`memplan validate`: predictions beside everything that was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from memplan import accuracy, importers
from memplan.accuracy import Comparison
from memplan.commands.options import json_option, without_compiler
from memplan.errors import InputError, MissingExtraError
from memplan.profile import Profile
from memplan.reporters import accuracy as reporter
from memplan.reporters import json, terminal
from memplan.store import RUNS_FOLDER, write_text


@click.command()
@click.option(
    "--runs",
    "places",
    multiple=True,
    metavar="PATH",
    help="A folder of runs, a run, or another's measurements; may be repeated "
    "[what memplan carries, and profiles/runs].",
)
@click.option("--markdown", metavar="FILE", help="Write the report as Markdown.")
@click.option("--figure", metavar="FILE", help="Draw predicted against measured.")
@click.option("--residuals", metavar="FILE", help="Write the errors of every run.")
@json_option
def command(
    places: tuple[str, ...],
    markdown: str | None,
    figure: str | None,
    residuals: str | None,
    as_json: bool,
) -> None:
    """Compare predictions with everything that was measured.

    Runs are listed with the worst first; groups of them are never pooled.
    """
    found = runs_at(places)
    comparisons, left_out = compare_all(found, quiet=as_json)
    groups = accuracy.groups_of(comparisons)
    if figure is not None:
        reporter.draw(comparisons, Path(figure))
    if residuals is not None:
        accuracy.write_residuals(comparisons, Path(residuals))
    if markdown is not None:
        picture = Path(figure).name if figure else ""
        text = reporter.as_markdown(groups, comparisons, left_out, picture)
        write_text(Path(markdown), text, "--markdown")
    if as_json:
        json.print_validation(
            [each.to_json() for each in comparisons],
            [group.to_json() for group in groups],
            left_out,
        )
    elif markdown is None:
        reporter.report_validation(groups, comparisons, left_out)


def runs_at(places: Sequence[str]) -> tuple[Profile, ...]:
    """The runs of the places, or all that are known."""
    if not places:
        return accuracy.known_runs(RUNS_FOLDER)
    found = [importers.read(Path(place)).runs for place in places]
    return tuple(run for group in found for run in group)


def compare_all(
    found: Sequence[Profile], *, quiet: bool
) -> tuple[list[Comparison], dict[str, str]]:
    """Every run by every way, and the reasons of those that cannot be compared."""
    comparisons: list[Comparison] = []
    left_out: dict[str, str] = {}
    versions = json.versions()
    with terminal.progress("Validating", quiet=quiet) as told, without_compiler():
        for number, run in enumerate(found, start=1):
            for way, predict in accuracy.predictors_of(run, versions).items():
                told(f"{number} of {len(found)}, {run.id}")
                try:
                    comparisons.append(accuracy.compare(run, way, predict))
                except MissingExtraError:
                    raise
                except InputError as error:
                    left_out[run.id] = str(error)
    return comparisons, left_out
