"""An estimate on a terminal: the verdict, the terms, what else would fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memplan.architecture import Architecture
from memplan.estimator import Estimate
from memplan.estimator.equations import Term
from memplan.estimator.limits import LARGEST_BATCH, Limits
from memplan.gpu import Gpu
from memplan.inference import Inference
from memplan.recipe import Recipe
from memplan.reporters import footprint, terminal
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.batching import Batch
    from memplan.estimator.inference import InferenceEstimate
    from memplan.lengths import Lengths


def report(  # noqa: PLR0913 - each is a part of what is told
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None,
    estimate: Estimate | InferenceEstimate,
    terms: Sequence[Term],
    inference: Inference | None = None,
) -> None:
    """Prints what an estimated fine-tune takes and where it comes from."""
    told = footprint.headline(architecture, recipe, estimate.parameters, inference)
    terminal.say(told)
    terminal.say(footprint.verdict(estimate.footprint, gpu), style="bold")
    total = sum(term.num_bytes for term in terms) or 1
    peak = f"at the peak ({estimate.footprint.peak.label})"
    terminal.table(
        (peak, "bytes", "share", "which is"),
        [
            (
                term.name.replace("_", " "),
                format_bytes(term.num_bytes),
                f"{term.num_bytes / total:.1%}",
                term.words,
            )
            for term in terms
        ],
        right=("bytes", "share"),
        wraps=("which is",),
    )


def report_equations(terms: Sequence[Term]) -> None:
    """Prints each term's equation with the numbers put in."""
    rows = []
    for term in terms:
        name = term.name.replace("_", " ")
        rows.append((f"{name} = {term.words}", f"{term.num_bytes:,}"))
        for number, share in enumerate(term.shares):
            sign = "+" if number else "="
            rows.append((f"    {sign} {share.text}", f"{share.num_bytes:,}"))
    terminal.table(("equation", "bytes"), rows, right=("bytes",))


def report_limits(architecture: Architecture, recipe: Recipe, limits: Limits) -> None:
    """Prints the largest batch and the longest sequence that still fit."""
    batch, length = limits.batch_size, limits.sequence_length
    if batch is None and length is None:
        terminal.say("No batch and no sequence fits.")
        return
    batch_text = (
        f"no batch at {recipe.sequence_length:,} tokens"
        if batch is None
        else f"batches of {batch:,}{_more(batch)} at {recipe.sequence_length:,} tokens"
    )
    length_text = (
        f"no sequence at batch {recipe.batch_size:,}"
        if length is None
        else f"sequences of {length:,} tokens at batch {recipe.batch_size:,}"
    )
    end = ""
    if length is not None and length == architecture.max_positions:
        end = ", where the model's positions end"
    terminal.say(f"Still fit: {batch_text}; {length_text}{end}.")


def report_lengths(lengths: Lengths, recipe: Recipe, batches: Sequence[Batch]) -> None:
    """Prints what the lengths of a data set make of batches."""
    from memplan.batching import fewer_steps

    terminal.say(
        f"{lengths.num_samples:,} samples of {lengths.mean:,.0f} tokens in the mean: "
        f"p50 {lengths.percentile(0.5):,}, p99 {lengths.percentile(0.99):,}, longest "
        f"{lengths.longest:,}."
    )
    terminal.table(
        ("batch", "shape", "peak", "fits"),
        [_batch_row(batch) for batch in batches],
        right=("peak",),
    )
    saved = fewer_steps(recipe, lengths)
    terminal.say(
        f"Packing makes every batch as long as the longest and takes {saved:.0%} fewer "
        "steps. Padding-free batches hold their samples' tokens and no padding; both "
        "need a flash kernel that keeps samples apart, which is not checked here."
    )
    for batch in batches:
        if batch.problem:
            terminal.say(f"Note: {batch.name}: {batch.problem}", style="dim")


def _batch_row(batch: Batch) -> tuple[str, str, str, str]:
    recipe, found = batch.recipe, batch.footprint
    padded = ", padded" if recipe.padded else ""
    shape = f"{recipe.batch_size:,} x {recipe.sequence_length:,}{padded}"
    if found is None:
        return batch.name, shape, "", "cannot run"
    peak = found.life_peak
    taken = found.device_bytes(peak) or peak.reserved_bytes
    fits = {True: "yes", False: "no", None: ""}[found.fits]
    return batch.name, shape, format_bytes(taken), fits


def _more(batch: int) -> str:
    return " and more" if batch == LARGEST_BATCH else ""
