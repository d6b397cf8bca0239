"""A fine-tune's report as a document: every section, each with its picture or table."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from memplan import accuracy
from memplan.footprint import Footprint, Moment
from memplan.inference import Inference
from memplan.plan import Plan
from memplan.profile import Profile, slug
from memplan.recipe import recipe_text
from memplan.report import SOURCES, Report
from memplan.reporters.document import Code, Document, Section, Table
from memplan.reporters.figures import (
    breakdown,
    front,
    frontier,
    levers,
    measured,
    memory,
    modules,
)
from memplan.reporters.footprint import headline, verdict
from memplan.units import format_bytes

ESTIMATE_ERROR = (
    "On a grid of recipes tests hold an estimate's allocated bytes to 1 % of the "
    "simulation's at the median, and to 3 % in nineteen of twenty."
)

INFERENCE_ERROR = (
    "On simulated answers an estimate's allocated peak is held to 3 % of the "
    "simulation's in nineteen of twenty."
)


def document(report: Report) -> Document:
    """The report's content."""
    return Document(
        name=name_of(report),
        title=_title(report),
        verdict=sentence(report),
        fits=report.footprint.fits,
        lead=(
            f"{_headline(report)}; {SOURCES[report.kind]}.",
            *_drawn_from(report),
        ),
        sections=tuple(_sections(report)),
        numbers=report.to_json(),
    )


def _headline(report: Report) -> str:
    asked = report.architecture, report.recipe, report.parameters, report.inference
    return headline(*asked)


def sentence(report: Report) -> str:
    """The verdict, as every command says it."""
    return f"{verdict(report.footprint, report.gpu)}."


def name_of(report: Report) -> str:
    """The name of the report's files: the model, how it is trained, and the card."""
    recipe, gpu = report.recipe, report.gpu
    if report.measured is not None:
        return slug(f"run-{report.measured.id}")
    quantization = "" if recipe.quantization == "none" else recipe.quantization
    model = report.architecture.name.rpartition("/")[2].removesuffix(".json")
    card = "" if gpu is None else gpu.name
    planned = "plan" if report.plan is not None else ""
    answers = "inference" if report.inference is not None else ""
    return slug(" ".join((model, recipe.method, quantization, card, planned, answers)))


def _title(report: Report) -> str:
    recipe = report.recipe
    on = "" if recipe.quantization == "none" else f" on {recipe.quantization}"
    card = "" if report.gpu is None else f", {report.gpu.name}"
    what = recipe.method if report.inference is None else f"inference, {recipe.method}"
    return f"{report.architecture.name}: {what}{on}{card}"


def _drawn_from(report: Report) -> Iterator[str]:
    if report.kind == report.drawn_from or not report.course:
        return
    yield f"The pictures are of its {report.drawn_from}."


def _sections(report: Report) -> Iterator[Section]:
    yield memory_section(report)
    if report.terms:
        yield breakdown_section(report)
    if report.measured is not None and report.predicted is not None:
        yield _measured(report.measured, report.footprint, report.predicted)
    if report.levers.changes:
        yield levers_section(report)
    if any(one.sequence_length for one in report.reach):
        yield frontier_section(report)
    if any(cell.layer is not None for cell in report.cells):
        yield _modules(report)
    if report.largest:
        yield _largest(report)
    if report.plan is not None:
        yield from _plan(report.plan)
    if report.terms:
        yield _equations(report)
    yield _accuracy(report)
    yield _to_copy(report)
    yield assumptions_section(report)


def memory_section(report: Report) -> Section:
    """Memory through load and what follows, and the peak of each moment."""
    rows = [
        (moment.label, *map(_read, _peaks(moment)))
        for moment in report.footprint.moments
    ]
    return Section(
        title=memory.title(report),
        figure=memory.figure(report) if report.course else None,
        table=Table(
            columns=("moment", "allocated", "reserved"),
            rows=rows,
            right=("allocated", "reserved"),
        ),
    )


def _peaks(moment: Moment) -> tuple[int, int]:
    return moment.allocated_bytes, moment.reserved_bytes


def _read(num_bytes: int) -> str:
    """A reading; 0 bytes were not read."""
    return format_bytes(num_bytes) if num_bytes else "-"


def breakdown_section(report: Report, *, pictured: bool = True) -> Section:
    """The peak by category."""
    total = sum(term.num_bytes for term in report.terms) or 1
    return Section(
        title="What the peak is made of",
        figure=breakdown.figure(report) if pictured else None,
        table=Table(
            columns=("term", "bytes", "share", "which is"),
            rows=[
                (
                    term.name.replace("_", " "),
                    format_bytes(term.num_bytes),
                    f"{term.num_bytes / total:.1%}",
                    term.words,
                )
                for term in report.terms
            ],
            right=("bytes", "share"),
            colours=[term.name for term in report.terms],
        ),
    )


def _measured(run: Profile, found: Footprint, predicted: Footprint) -> Section:
    labels = measured.shared(found, predicted)
    sides = [
        {moment.label: moment.allocated_bytes for moment in footprint.moments}
        for footprint in (found, predicted)
    ]
    compared = accuracy.compare(run, "", lambda _: predicted)
    pairs = {label: tuple(side[label] for side in sides) for label in labels} | {
        f"peak, {reading}": (size, compared.predicted[reading])
        for reading, size in compared.measured.items()
    }
    return Section(
        title="Measured beside predicted",
        words=(f"Run {run.id}, measured by {run.source} on {run.card}.",),
        figure=measured.figure(found, predicted) if labels else None,
        table=Table(
            columns=("reading", "measured", "predicted", "error"),
            rows=[
                (label, *map(format_bytes, pair), f"{pair[1] / pair[0] - 1:+.2%}")
                for label, pair in pairs.items()
            ],
            right=("measured", "predicted", "error"),
        ),
    )


def levers_section(report: Report, *, pictured: bool = True) -> Section:
    """Changes of one knob, what saves the most first."""
    changes, unknown = report.levers.changes, report.levers.num_unknown
    left_out = (
        f"{unknown} more would have to be traced first; `memplan why-not` has them.",
    )
    return Section(
        title="What a change would save",
        words=left_out if unknown else (),
        figure=levers.figure(report) if pictured else None,
        table=Table(
            columns=("change", "saves", "then lacks", "speed"),
            rows=[
                (
                    levers.name(one),
                    format_bytes(one.saved_bytes),
                    "fits" if one.fits else format_bytes(one.missing_bytes),
                    f"{one.speed:.2f}",
                )
                for one in changes
            ],
            right=("saves", "then lacks", "speed"),
        ),
    )


def frontier_section(report: Report, *, pictured: bool = True) -> Section:
    """The longest sequence that fits, batch by batch."""
    ends = any(one.ends for one in report.reach)
    return Section(
        title="Longest sequence by batch",
        words=("*: the model's positions end there.",) if ends else (),
        figure=frontier.figure(report) if pictured else None,
        table=Table(
            columns=("batch", "longest sequence"),
            rows=[
                (
                    str(one.batch_size),
                    f"{one.sequence_length:,}{'*' if one.ends else ''}"
                    if one.sequence_length
                    else "none fits",
                )
                for one in report.reach
            ],
            right=("batch", "longest sequence"),
        ),
    )


def _modules(report: Report) -> Section:
    outside = [cell for cell in report.cells if cell.layer is None]
    told = ", ".join(
        f"{cell.module} ({cell.bits} bits"
        + (f", rank {cell.rank})" if cell.rank else ", frozen)")
        for cell in outside
    )
    return Section(
        title="Ranks and bits by layer",
        words=(f"Outside of the layers: {told}.",) if outside else (),
        figure=modules.figure(report),
    )


def _largest(report: Report) -> Section:
    return Section(
        title="Largest tensors at the peak",
        table=Table(
            columns=("module", "bytes", "for", "allocated by"),
            rows=[
                (
                    block.module or "(outside of modules)",
                    format_bytes(block.num_bytes),
                    block.category.replace("_", " "),
                    block.operator,
                )
                for block in report.largest
            ],
            right=("bytes",),
            colours=[block.category for block in report.largest],
        ),
    )


def _plan(plan: Plan) -> Iterator[Section]:
    checked = f"Verified by the {plan.verified_by}; decision {plan.hash}."
    yield Section(title="Why this plan", words=(*plan.reasons, checked))
    if plan.alternatives:
        yield Section(
            title="Recipes that nothing beats",
            figure=front.figure(plan),
            table=Table(
                columns=("recipe", "reserved", "tokens", "rank", "speed"),
                rows=[
                    (
                        f"{one['recipe']['batch_size']} x "
                        f"{one['recipe']['checkpointing']}, "
                        f"{one['recipe']['optimizer']}, {one['recipe']['loss']}",
                        format_bytes(one["reserved_bytes"]),
                        f"{one['sequence_length']:,}",
                        str(one["rank"]),
                        f"{one['speed']:.2f}",
                    )
                    for one in plan.alternatives
                ],
                right=("reserved", "tokens", "rank", "speed"),
            ),
        )


def _equations(report: Report) -> Section:
    rows, colours = [], []
    for term in report.terms:
        rows.append((term.name.replace("_", " "), term.words, f"{term.num_bytes:,}"))
        colours.append(term.name)
        for share in term.shares:
            rows.append(("", share.text, f"{share.num_bytes:,}"))
            colours.append("")
    return Section(
        title="Where each byte comes from",
        table=Table(
            columns=("term", "is", "bytes"),
            rows=rows,
            right=("bytes",),
            colours=colours,
        ),
    )


def _accuracy(report: Report) -> Section:
    if report.inference is not None:
        return Section(title="How far off", words=(INFERENCE_ERROR,))
    if not report.errors:
        none = (
            "No run of this method and quantisation was measured on a card of the same "
            "compute capability."
        )
        return Section(title="How far off", words=(ESTIMATE_ERROR, none))
    rows = [
        (reading, str(one.count), f"{one.least:+.2%}", f"{one.most:+.2%}")
        for reading, one in report.errors.items()
    ]
    return Section(
        title="How far off",
        words=(
            ESTIMATE_ERROR,
            f"{_PREDICTIONS.get(report.kind, 'Simulations')} of runs that were "
            "measured, of the same method and quantisation on cards of the same "
            "compute capability, were off by:",
        ),
        table=Table(
            columns=("reading", "runs", "least", "most"),
            rows=rows,
            right=("runs", "least", "most"),
        ),
    )


_PREDICTIONS = {"estimate": "Estimates"}
"""Whose errors stand in a report, by its kind; else the simulations'."""


def _to_copy(report: Report) -> Section:
    recipe = Code(name="recipe.yaml", text=recipe_text(report.recipe.to_json()))
    files = [
        Code(name=f"{one.trainer}: {one.file}", text=one.text) for one in report.exports
    ]
    return Section(
        title="To copy",
        words=(_MADE_WITH if files else "What this was made with.",),
        code=(Code(name="Commands", text=commands(report)), recipe, *files),
    )


_MADE_WITH = (
    "What this was made with, and the files of trainers that can run it; "
    "`memplan export` writes them, and checks them with torch."
)


def commands(report: Report) -> str:
    """How to ask the same again, and what comes next."""
    model = shlex.quote(report.architecture.name)
    card = "" if report.gpu is None else f" --gpu {shlex.quote(report.gpu.name)}"
    asked = f"{model} --recipe recipe.yaml"
    if report.inference is not None:
        asked += f" {_options(report.inference)}{card}"
        return f"memplan estimate {asked}\nmemplan simulate {asked} --top 10\n"
    lines = [
        f"memplan estimate {asked}{card}",
        f"memplan simulate {asked}{card} --top 10",
        f"memplan why-not {asked}{card}" if card else "",
        f"memplan export recipe.yaml --model {model} --to trl --out train",
    ]
    return "".join(f"{line}\n" for line in lines if line)


def _options(inference: Inference) -> str:
    """How a command is asked for it."""
    options = {
        "new-tokens": inference.num_tokens,
        "adapters": inference.adapters,
        "sampling": inference.sampling,
        "cache": inference.cache,
    }
    return " ".join(
        ("--inference", *(f"--{name} {value}" for name, value in options.items()))
    )


def assumptions_section(report: Report) -> Section:
    """Notes and versions."""
    versions = ", ".join(f"{name} {one}" for name, one in report.versions.items())
    return Section(
        title="What was assumed",
        words=(
            "The card's line is what it offers torch: its capacity less the CUDA "
            "context and what is kept back.",
            *report.notes,
            f"Versions: {versions}.",
        ),
    )
