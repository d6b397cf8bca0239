"""An inspected model on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from memplan.architecture import Architecture, Block, Linear
from memplan.reporters import terminal
from memplan.units import format_count


def report(architecture: Architecture, notes: Sequence[str]) -> None:
    """Prints the model: its counts, its blocks, and what lies outside of them."""
    terminal.say(_headline(architecture), style="bold")
    _report_counts(architecture)
    for block in architecture.blocks:
        _report_block(block)
    _report_outside(architecture)
    for note in (*architecture.notes, *notes):
        terminal.say(note)


def _headline(architecture: Architecture) -> str:
    total = architecture.total_parameters
    return (
        f"{architecture.name}: {architecture.class_name}, {total:,} parameters "
        f"({format_count(total)}), {architecture.num_layers} layers, hidden size "
        f"{architecture.hidden_size}, vocabulary {architecture.vocab_size}"
    )


def _report_counts(architecture: Architecture) -> None:
    total = architecture.total_parameters or 1
    terminal.table(
        ("parameters", "count", "share"),
        [
            (kind, f"{count:,}", f"{count / total:.1%}")
            for kind, count in architecture.parameters_by_kind.items()
        ],
        right=("count", "share"),
    )


def _report_block(block: Block) -> None:
    rows = [_linear_row(linear) for linear in block.linears]
    rows += [
        (p.path, p.kind, " x ".join(map(str, p.shape)), "", f"{p.num_parameters:,}")
        for p in block.parameters
    ]
    terminal.table(
        ("module", "kind", "shape", "bias", "parameters"),
        rows,
        right=("shape", "parameters"),
        title=f"{len(block.layers)} x {block.name} in {block.stack}: "
        f"{block.num_parameters:,} parameters each",
    )


def _report_outside(architecture: Architecture) -> None:
    rows = [_linear_row(linear) for linear in architecture.linears]
    rows += [
        (p.path, p.kind, " x ".join(map(str, p.shape)), "", f"{p.num_parameters:,}")
        for p in architecture.parameters
    ]
    terminal.table(
        ("module", "kind", "shape", "bias", "parameters"),
        rows,
        right=("shape", "parameters"),
        title="Outside of the layers",
        caption="The head is the input embedding." if architecture.tied else "",
    )


def _linear_row(linear: Linear) -> tuple[str, str, str, str, str]:
    shape = f"{linear.in_features} -> {linear.out_features}"
    bias = "yes" if linear.bias else ""
    return linear.path, linear.kind, shape, bias, f"{linear.num_parameters:,}"
