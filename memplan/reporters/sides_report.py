"""Fine-tunes of one model side by side, as a document."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from memplan.comparison import Side, differences
from memplan.gpu import Gpu
from memplan.profile import slug
from memplan.recipe import Recipe, recipe_text
from memplan.report import SOURCES
from memplan.reporters.comparison import shown
from memplan.reporters.document import Code, Document, Section, Table
from memplan.reporters.figures import sides as figure
from memplan.reporters.footprint import verdict
from memplan.units import format_bytes, format_count


def document(
    sides: Sequence[Side], gpu: Gpu | None, versions: Mapping[str, str]
) -> Document:
    """The report on the sides, which are of one model and on one card."""
    first = sides[0]
    card = "" if gpu is None else f", {gpu.name}"
    return Document(
        name=slug(f"{first.model.rpartition('/')[2]} {len(sides)} recipes {card}"),
        title=f"{first.model}: {len(sides)} recipes side by side{card}",
        verdict=_verdict(sides, gpu),
        fits=None if gpu is None else any(side.footprint.fits for side in sides),
        lead=(
            f"{format_count(first.parameters['total'])} parameters; "
            f"{', '.join(side.name for side in sides)}: {SOURCES[first.kind]}.",
        ),
        sections=tuple(_sections(sides, gpu, versions)),
        numbers={
            "kind": "comparison",
            "gpu": None if gpu is None else gpu.to_json(),
            "sides": [side.to_json() for side in sides],
        },
    )


def _verdict(sides: Sequence[Side], gpu: Gpu | None) -> str:
    least = min(sides, key=lambda side: side.footprint.life_peak.reserved_bytes)
    size = format_bytes(least.footprint.life_peak.reserved_bytes)
    smallest = f"the smallest, {least.name}, reserves {size}"
    if gpu is None:
        return f"Of {len(sides)} recipes {smallest}."
    fitting = [side.name for side in sides if side.footprint.fits]
    named = f": {', '.join(fitting)}" if fitting else ""
    return f"{len(fitting)} of {len(sides)} fit on {gpu.name}{named}; {smallest}."


def _sections(
    sides: Sequence[Side], gpu: Gpu | None, versions: Mapping[str, str]
) -> Iterator[Section]:
    yield _verdicts(sides, gpu)
    yield Section(
        title="What the peaks are made of",
        words=tuple(_pictured(sides, gpu)),
        figure=figure.figure(sides),
        table=_bytes(sides, "term", lambda side: side.breakdown),
    )
    yield Section(
        title="Moment by moment",
        words=("The most that is allocated in each.",),
        table=_bytes(sides, "moment", lambda side: side.moments),
    )
    yield _recipes(sides)
    yield _to_copy(sides, gpu)
    notes = dict.fromkeys(note for side in sides for note in side.footprint.notes)
    told = ", ".join(f"{name} {one}" for name, one in versions.items())
    assumed = (*(gpu.assumptions if gpu else ()), *notes, f"Versions: {told}.")
    yield Section(title="What was assumed", words=assumed)


def _pictured(sides: Sequence[Side], gpu: Gpu | None) -> Iterator[str]:
    if gpu is not None:
        yield "The line is what the card offers, the CUDA context included."
    if any(side.footprint.paged_bytes for side in sides):
        yield (
            "The picture leaves out what is paged, which the driver moves to the host "
            "where it must."
        )


def _verdicts(sides: Sequence[Side], gpu: Gpu | None) -> Section:
    return Section(
        title="Which fits" if gpu else "What each takes",
        table=Table(
            columns=("recipe", "trains", "verdict"),
            rows=[
                (
                    side.name,
                    f"{side.parameters['trainable']:,}",
                    f"{verdict(side.footprint, gpu)}.",
                )
                for side in sides
            ],
            right=("trains",),
        ),
    )


def _bytes(
    sides: Sequence[Side], of: str, bytes_of: Callable[[Side], Mapping[str, int]]
) -> Table:
    """A row a name that any side has bytes of, a column a side."""
    columns = [bytes_of(side) for side in sides]
    names = [
        name
        for name in dict.fromkeys(name for column in columns for name in column)
        if any(column.get(name) for column in columns)
    ]
    sizes = ([column.get(name, 0) for column in columns] for name in names)
    labels = tuple(side.name for side in sides)
    return Table(
        columns=(of, *labels),
        rows=[
            (
                name.replace("_", " "),
                *(format_bytes(size) if size else "" for size in row),
            )
            for name, row in zip(names, sizes, strict=True)
        ],
        right=labels,
        colours=names if of == "term" else (),
    )


def _recipes(sides: Sequence[Side]) -> Section:
    """The keys in which any recipe differs from the first."""
    found = differences(tuple(sides))
    keys = dict.fromkeys(key for one in found for key in one.recipe)
    rows = [(key, *(shown(side.recipe.get(key)) for side in sides)) for key in keys]
    return Section(
        title="Where the recipes differ",
        table=Table(columns=("key", *(side.name for side in sides)), rows=rows),
    )


def _to_copy(sides: Sequence[Side], gpu: Gpu | None) -> Section:
    """The recipes as files, and what reports on one of them or on all."""
    model = shlex.quote(sides[0].model)
    card = "" if gpu is None else f" --gpu {shlex.quote(gpu.name)}"
    files = [f"{slug(side.name)}.yaml" for side in sides]
    every = " ".join(f"--recipe {file}" for file in files)
    commands = (
        f"memplan report {model} {every}{card}\n"
        f"memplan report {model} --recipe {files[0]}{card}\n"
    )
    recipes = (Recipe.from_mapping(side.recipe).to_json() for side in sides)
    return Section(
        title="To copy",
        code=(
            Code(name="Commands", text=commands),
            *(
                Code(name=file, text=recipe_text(recipe))
                for file, recipe in zip(files, recipes, strict=True)
            ),
        ),
    )
