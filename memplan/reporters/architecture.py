"""An inspected model on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.architecture import Architecture, Linear, Parameter
from memplan.reporters import terminal
from memplan.units import format_count


def report(architecture: Architecture, notes: Sequence[str]) -> None:
    """Prints the model: its counts, its blocks, and what lies outside of them."""
    terminal.say(f"{architecture.name}: {architecture.class_name}", style="bold")
    terminal.say(", ".join(_facts(architecture)))
    _report_counts(architecture)
    for block in architecture.blocks:
        title = (
            f"{len(block.layers)} x {block.name} in {block.stack}, "
            f"{block.num_parameters:,} parameters each"
        )
        _report_modules(title, block.linears, block.parameters)
    _report_modules(
        "Outside of the layers", architecture.linears, architecture.parameters
    )
    if notes:
        terminal.say("")
    for note in notes:
        terminal.say(note)


def _facts(architecture: Architecture) -> Iterator[str]:
    total = architecture.total_parameters
    yield f"{total:,} parameters ({format_count(total)})"
    layers = terminal.plus(architecture.layers_by_stack.values())
    yield f"{layers} layer{'' if layers == '1' else 's'}"
    if architecture.num_experts:
        yield f"{architecture.num_experts} experts"
    yield f"hidden size {architecture.hidden_size}"
    if architecture.vocab_size:
        yield f"vocabulary {architecture.vocab_size}"
    if architecture.max_positions:
        yield f"positions up to {architecture.max_positions}"
    if architecture.tied:
        yield "the head is the input embedding"


def _report_counts(architecture: Architecture) -> None:
    total = architecture.total_parameters or 1
    terminal.say("")
    terminal.table(
        ("parameters", "count", "share"),
        [
            (kind, f"{count:,}", f"{count / total:.1%}")
            for kind, count in architecture.parameters_by_kind.items()
        ],
        right=("count", "share"),
    )


def _report_modules(
    title: str, linears: Sequence[Linear], parameters: Sequence[Parameter]
) -> None:
    terminal.say("")
    terminal.table(
        ("module", "kind", "shape", "bias", "parameters"),
        [*map(_linear_row, linears), *map(_parameter_row, parameters)],
        right=("shape", "parameters"),
        title=title,
    )


def _linear_row(linear: Linear) -> tuple[str, ...]:
    shape = f"{linear.in_features} -> {linear.out_features}"
    bias = "yes" if linear.bias else ""
    return linear.path, linear.kind, shape, bias, f"{linear.num_parameters:,}"


def _parameter_row(parameter: Parameter) -> tuple[str, ...]:
    shape = " x ".join(map(str, parameter.shape))
    return parameter.path, parameter.kind, shape, "", f"{parameter.num_parameters:,}"
