"""What the page answers to what is chosen on it; nothing here knows of Gradio."""

from __future__ import annotations

import functools
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan import estimator, exporters, tapes
from memplan.architecture import Architecture
from memplan.catalog import architecture_of
from memplan.errors import InputError, UntracedError
from memplan.estimator import Estimate
from memplan.exporters import Task
from memplan.gpu import Gpu, find_gpu
from memplan.hub import parse_config
from memplan.model_source import ModelSource, read_config
from memplan.plan import Plan, decision_hash
from memplan.planner import choices, decide
from memplan.planner.choices import Floors
from memplan.planner.means import means_on
from memplan.planner.ranks import DEFAULT_PRIOR
from memplan.recipe import Recipe, read_recipe_text
from memplan.report import Report, Subject, of_estimate
from memplan.reporters import files, html, json
from memplan.reporters import report as reporter
from memplan.units import format_bytes

KEYS = (
    "trainer",
    "method",
    "rank",
    "quantization",
    "batch_size",
    "sequence_length",
    "checkpointing",
    "optimizer",
)
"""The recipe's keys that have controls of their own."""

PASTED = "pasted config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is chosen on the page."""

    model: str
    config: str
    """The text of a config.json, which goes before the model; empty for none."""
    card: str
    keys: tuple[tuple[str, Any], ...]
    """Those of KEYS that have a value."""
    more: str
    """Further keys of the recipe, as a recipe file has them."""

    @property
    def recipe(self) -> Recipe:
        more = (
            read_recipe_text(self.more, "further keys")[0] if self.more.strip() else {}
        )
        return Recipe.from_mapping({**dict(self.keys), **more})

    @property
    def gpu(self) -> Gpu | None:
        return find_gpu(self.card) if self.card.strip() else None

    @property
    def subject(self) -> Subject:
        """What is asked, checked; raises InputError."""
        return Subject(
            architecture=architecture(self.model, self.config),
            recipe=self.recipe,
            gpu=self.gpu,
            versions=json.versions(),
        )


@functools.lru_cache(maxsize=32)
def architecture(model: str, config: str) -> Architecture:
    """The model that is chosen, or that of a pasted config, which needs torch."""
    if not config.strip():
        return architecture_of(read_config(model))
    try:
        parsed = parse_config(config.encode())
    except ValueError as error:
        remedy = "paste the config.json of a model"
        raise InputError("config", config, str(error), remedy) from error
    return architecture_of(ModelSource(name=PASTED, origin="file", config=parsed))


@functools.lru_cache(maxsize=8)
def estimated(asked: Asked) -> Estimate:
    """The estimate, replayed through the allocator, as the command prints it."""
    subject = asked.subject
    found = estimator.run(subject.architecture, subject.recipe, subject.gpu)
    return estimator.replayed(found, subject.gpu)


def first(asked: Asked) -> str:
    """What the closed form alone knows, in milliseconds: what is allocated, as HTML.

    A replay takes longer the more layers a model has, so that this is shown before it.
    """
    if asked.config.strip():
        return html.pending("The model of the pasted config is being built.")
    try:
        subject = asked.subject
        with tapes.known_only():
            found = estimator.run(subject.architecture, subject.recipe, subject.gpu)
    except UntracedError:
        return html.pending("Nothing is known of this yet: it is being traced, once.")
    except InputError as error:
        return html.alert(str(error))
    return html.pending(
        f"{format_bytes(found.footprint.life_peak.allocated_bytes)} allocated at the "
        "peak; what the allocator holds beyond that is being replayed."
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the page shows of what is asked, as HTML."""

    verdict: str
    breakdown: str


def answer(asked: Asked) -> Answer:
    """The verdict and what it is made of; what is wrong with the input, in words."""
    try:
        report = of_estimate(asked.subject, estimated(asked), whole=False)
    except InputError as error:
        return Answer(verdict=html.alert(str(error)), breakdown="")
    return Answer(
        verdict=html.verdict(reporter.sentence(report), report.footprint.fits),
        breakdown=html.fragment([reporter.breakdown_section(report, pictured=False)]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Details:
    """What the page shows beside an answer, as HTML."""

    memory: str
    """Over the step, as a picture and a table."""
    changes: str
    """What they would save, how far sequences reach, and what was assumed."""


def details(asked: Asked) -> Details:
    """The details of an answer; empty where there is none."""
    try:
        report = of_estimate(asked.subject, estimated(asked))
    except InputError:
        return Details(memory="", changes="")
    sections = [reporter.assumptions_section(report)]
    if any(one.sequence_length for one in report.reach):
        sections.insert(0, reporter.frontier_section(report, pictured=False))
    if report.levers.changes:
        sections.insert(0, reporter.levers_section(report, pictured=False))
    return Details(
        memory=html.fragment([reporter.memory_section(report)]),
        changes=html.fragment(sections),
    )


def plan(asked: Asked) -> Plan:
    """The plan for the model and the card, which the replayed estimate upholds.

    The length, the batch of an optimizer step and the trainer that are chosen are its
    floors. Raises InputError where nothing fits, or without a card.
    """
    subject = asked.subject
    gpu = subject.gpu
    if gpu is None:
        raise InputError("card", "", "is missing", "choose the card to plan for")
    recipe, model = subject.recipe, subject.architecture
    base = Recipe(
        trainer=recipe.trainer,
        method=recipe.method,
        sequence_length=recipe.sequence_length,
    )
    wanted = decide.Asked(
        base=base,
        given=frozenset({"trainer", "method", "sequence_length"}),
        floors=Floors(
            sequence_length=recipe.sequence_length,
            effective_batch=choices.EFFECTIVE_BATCH,
            rank=choices.RANKS[0],
            margin_bytes=int(choices.MARGIN_SHARE * gpu.budget_bytes),
        ),
        prefer=choices.PREFERENCES[0],
        granularity="by-type",
        prior=DEFAULT_PRIOR,
    )
    means = means_on(model, gpu, wanted.floors.margin_bytes)
    return decide.plan(model, gpu, wanted, means)


def report_files(asked: Asked) -> list[str]:
    """The report's HTML, and all of its files in an archive."""
    document = reporter.document(of_estimate(asked.subject, estimated(asked)))
    folder = Path(tempfile.mkdtemp(prefix="memplan-"))
    written = files.write(document, folder)
    return [str(written[0]), str(_zipped(folder, document.name, written))]


def export_files(asked: Asked, trainer: str) -> list[str]:
    """A trainer's files in an archive, checked as far as torch is here to check."""
    report: Report = of_estimate(asked.subject, estimated(asked))
    card = None if report.gpu is None else report.gpu.to_json()
    task = Task(
        model=report.architecture.name,
        architecture=report.architecture,
        recipe=report.recipe,
        hash=decision_hash(report.architecture.name, report.recipe, card),
        predicted=report.footprint.peak_json(report.footprint.peak),
        predicted_by="estimate",
        card=None if report.gpu is None else report.gpu.name,
    )
    folder = Path(tempfile.mkdtemp(prefix="memplan-"))
    written, _ = exporters.export(task, trainer, folder / trainer)
    return [str(_zipped(folder, trainer, written))]


def _zipped(folder: Path, name: str, written: tuple[Path, ...]) -> Path:
    archive = folder / f"{name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        for file in written:
            opened.write(file, file.relative_to(folder))
    return archive
