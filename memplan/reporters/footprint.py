"""A footprint on a terminal: the verdict, the moments, the peak's breakdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from memplan.architecture import Architecture
from memplan.footprint import Footprint
from memplan.generation import GREEDY, TOP_K, TOP_P
from memplan.gpu import Gpu
from memplan.inference import MERGED, NONE, SEPARATE, Inference
from memplan.recipe import Recipe
from memplan.reporters import terminal
from memplan.units import format_bytes, format_count

if TYPE_CHECKING:
    from memplan.residuals import Range
    from memplan.simulation import Simulation

BAR_WIDTH = 24
"""Characters of the longest bar."""


def report_simulation(  # noqa: PLR0913 - each is a part of what is told
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu | None,
    simulation: Simulation,
    top: int,
    inference: Inference | None = None,
) -> None:
    """Prints a simulated fine-tune, or inference."""
    footprint = simulation.footprint
    terminal.say(headline(architecture, recipe, simulation.parameters, inference))
    terminal.say(verdict(footprint, gpu), style="bold")
    _report_moments(footprint)
    _report_breakdown(footprint)
    newest = simulation.peak_blocks[-1:]
    if newest:
        where = newest[0].module or "the loop"
        terminal.say(f"The peak is reached by {newest[0].operator} in {where}.")
    _report_host(simulation.host)
    if top:
        _report_largest(simulation, top)
    report_notes((*(gpu.assumptions if gpu else ()), *footprint.notes))


def report_residuals(recipe: Recipe, gpu: Gpu, errors: Mapping[str, Range]) -> None:
    """Prints how far predictions were from comparable measured runs."""
    major, minor = gpu.compute_capability
    kind = f"{recipe.method}, {recipe.quantization}, capability {major}.{minor}"
    if not errors:
        terminal.say(f"No comparable run was measured ({kind}).")
        return
    told = (
        f"{reading} {one.least:+.2%} to {one.most:+.2%} ({one.count})"
        for reading, one in errors.items()
    )
    terminal.say(
        f"Predicted beside measured in comparable runs ({kind}): {', '.join(told)}."
    )


def report_notes(notes: Sequence[str]) -> None:
    """Prints what was assumed and what is worth knowing."""
    for note in notes:
        terminal.say(f"Note: {note}", style="dim")


def headline(
    architecture: Architecture,
    recipe: Recipe,
    parameters: Mapping[str, int],
    inference: Inference | None = None,
) -> str:
    """What is trained, how, and how much of it; or what answers, and how long."""
    if inference is not None:
        return _inference_headline(architecture, recipe, inference)
    quantization = "" if recipe.quantization == "none" else f" on {recipe.quantization}"
    return (
        f"{architecture.name}, {recipe.method}{quantization}, batch "
        f"{recipe.batch_size} x {recipe.sequence_length} tokens: trains "
        f"{parameters['trainable']:,} of {format_count(parameters['total'])} parameters"
    )


_SAMPLED = {GREEDY: "", TOP_K: " by top-k", TOP_P: " by top-p"}
"""What is said of how tokens are chosen."""

_ADAPTED = {SEPARATE: ", {} beside it", MERGED: ", {} merged into it", NONE: ""}
"""What is said of a method's adapters."""


def _inference_headline(
    architecture: Architecture, recipe: Recipe, inference: Inference
) -> str:
    base = recipe.dtype if recipe.quantization == "none" else recipe.quantization
    adapted = _ADAPTED[inference.adapters].format(recipe.method)
    return (
        f"{architecture.name} in {base}{adapted}: {recipe.batch_size} x "
        f"{recipe.sequence_length} tokens read, {inference.num_tokens} each answered"
        f"{_SAMPLED[inference.sampling]}, "
        f"by {format_count(architecture.total_parameters)} parameters"
    )


def verdict(footprint: Footprint, gpu: Gpu | None) -> str:
    """Whether it fits and by how much; the peak where no card is given."""
    peak = footprint.life_peak
    if gpu is None or footprint.margin_bytes is None:
        return (
            f"Peak {format_bytes(peak.allocated_bytes)} allocated, "
            f"{format_bytes(peak.reserved_bytes)} reserved, in {peak.label}"
        )
    if footprint.failed_moment is not None:
        return (
            f"Does not fit on {gpu.name}: runs out of memory in "
            f"{footprint.failed_moment}, {format_bytes(footprint.missing_bytes)} short"
        )
    needed = format_bytes(footprint.device_bytes(peak) or 0)
    if not footprint.fits:
        return (
            f"Does not fit on {gpu.name}: {needed} on the device in {peak.label}, "
            f"{format_bytes(-footprint.margin_bytes)} short"
        )
    return (
        f"Fits on {gpu.name}: {needed} on the device, "
        f"{format_bytes(footprint.margin_bytes)} to spare"
    )


def _report_moments(footprint: Footprint) -> None:
    terminal.table(
        ("moment", "allocated", "reserved"),
        [
            (
                moment.label,
                format_bytes(moment.allocated_bytes),
                format_bytes(moment.reserved_bytes),
            )
            for moment in footprint.moments
        ],
        right=("allocated", "reserved"),
    )


def _report_breakdown(footprint: Footprint) -> None:
    parts = {name: size for name, size in footprint.breakdown.items() if size}
    total = sum(parts.values()) or 1
    largest = max(parts.values(), default=1)
    terminal.table(
        (f"at the peak ({footprint.peak.label})", "bytes", "share", ""),
        [
            (
                name.replace("_", " "),
                format_bytes(size),
                f"{size / total:.1%}",
                "#" * max(0, round(BAR_WIDTH * size / largest)),
            )
            for name, size in parts.items()
        ],
        right=("bytes", "share"),
    )


def _report_host(host: Mapping[str, int]) -> None:
    """Prints what a process copies on the host, beside the files that it maps."""
    copied = [
        f"{name.removesuffix('_bytes')} {format_bytes(size)}"
        for name, size in host.items()
        if name != "mapped_bytes"
    ]
    if copied:
        mapped = format_bytes(host.get("mapped_bytes", 0))
        listed = ", ".join(copied)
        terminal.say(f"Host memory beside {mapped} of mapped files: {listed}.")


def _report_largest(simulation: Simulation, top: int) -> None:
    terminal.table(
        ("largest at the peak", "bytes", "for", "allocated by"),
        [
            (
                block.module or "(outside of modules)",
                format_bytes(block.num_bytes),
                block.category.replace("_", " "),
                block.operator,
            )
            for block in simulation.largest(top)
        ],
        right=("bytes",),
    )
