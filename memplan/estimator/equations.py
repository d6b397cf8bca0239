"""The terms of an estimate as equations: in words, and with the numbers put in.

Shapes: B sequences of T tokens, N = B T; layers map i features to o; r is the rank, H
the hidden size, V the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memplan import optimizers, quantizations
from memplan.estimator import Estimate
from memplan.estimator.regimes import dtype_outside, is_prepared
from memplan.estimator.schedule import workspaces
from memplan.estimator.trained import Tensors
from memplan.estimator.weights import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A part of a term, as an equation with the numbers put in."""

    text: str
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """A category of the peak's bytes and where they come from."""

    name: str
    """One of memplan.footprint.CATEGORIES."""
    num_bytes: int
    words: str
    """The equation in words."""
    shares: tuple[Share, ...]
    """They sum to the term's bytes."""

    def to_json(self) -> dict[str, Any]:
        """The term as output shows it."""
        return {
            "term": self.name,
            "bytes": self.num_bytes,
            "equation": self.words,
            "shares": [
                {"equation": share.text, "bytes": share.num_bytes}
                for share in self.shares
            ],
        }


WORDS: Mapping[str, str] = {
    "weights": "numbers x bytes as stored",
    "quantization_state": "scales of the quantised blocks",
    "adapters": "r (i + o) of each adapted layer x bytes",
    "gradients": "trained numbers x bytes, as far as backward has come",
    "optimizer": "trained numbers x bytes of state",
    "activations": "what layers keep for backward + one layer at work",
    "logits": "B T V x bytes, as often as the loss copies them",
    "kv_cache": "keys and values: B x tokens x layers x (k + v) x bytes",
    "workspace": "cuBLAS, for each thread that multiplies",
    "cache": "what the allocator holds beyond what is allocated",
    "context": "the CUDA context of the card",
    "paged": "optimizer state in managed memory",
}
"""Each term's equation in words; methods other than LoRA count their own shapes."""

ROUNDING = "what the allocator adds, which rounds blocks up"


def terms(estimate: Estimate) -> tuple[Term, ...]:
    """The terms of the peak that are not empty, largest parts written out."""
    breakdown = estimate.footprint.breakdown
    return tuple(
        Term(
            name=name,
            num_bytes=num_bytes,
            words=_words(name, estimate.footprint.peak.label),
            shares=tuple(_with_rest(name, num_bytes, _SHARES[name](estimate))),
        )
        for name, num_bytes in breakdown.items()
        if num_bytes
    )


def _words(name: str, moment: str) -> str:
    if name == "activations" and not moment.endswith(("forward", "backward")):
        return f"what {moment.partition('.')[2]} makes and drops again"
    return WORDS[name]


_REST = {
    "weights": ROUNDING,
    "adapters": f"what the method adds untrained, and {ROUNDING}",
    "gradients": ROUNDING,
    "optimizer": f"step counts, and {ROUNDING}",
    "activations": "one layer at work, masks, norms and loss",
}


def _with_rest(name: str, num_bytes: int, shares: Iterator[Share]) -> Iterator[Share]:
    """The shares, and what is left of the term after them."""
    left = num_bytes
    for share in shares:
        left -= share.num_bytes
        yield share
    if left:
        yield Share(text=_REST.get(name, "other"), num_bytes=left)


def _weights(estimate: Estimate) -> Iterator[Share]:
    parts, recipe = estimate.parts, estimate.parts.recipe
    numbers, layers = _quantized(estimate)
    if numbers:
        bits = quantizations.find(recipe.quantization).bits or 0
        yield Share(
            text=f"{recipe.quantization}: {numbers:,} weights of {layers} layers x "
            f"{bits} bits",
            num_bytes=numbers * bits // 8,
        )
    others = parts.architecture.total_parameters - numbers
    dtype = dtype_outside(recipe)
    why = ", cast by k-bit preparation" if is_prepared(recipe) else ""
    yield Share(
        text=f"{others:,} numbers x {DTYPE_BYTES[dtype]} B ({dtype}{why})",
        num_bytes=others * DTYPE_BYTES[dtype],
    )


def _quantized(estimate: Estimate) -> tuple[int, int]:
    """Quantised weights, and in how many layers they are."""
    found = [
        (role.linear.num_weights, count)
        for role, count in estimate.parts.layout.linears
        if role.quantized
    ]
    return sum(size * count for size, count in found), sum(n for _, n in found)


def _quantization_state(estimate: Estimate) -> Iterator[Share]:
    parts = estimate.parts
    numbers, _ = _quantized(estimate)
    state = parts.weights.state
    bits = 8 * state / max(numbers, 1)
    yield Share(
        text=f"{parts.recipe.quantization}: {numbers:,} weights x {bits:.4f} bits",
        num_bytes=state,
    )


def _adapters(estimate: Estimate) -> Iterator[Share]:
    yield from _by_item(estimate.parts.trained.tensors)


def _gradients(estimate: Estimate) -> Iterator[Share]:
    parts = estimate.parts
    there = estimate.footprint.breakdown["gradients"]
    if there < parts.gradients:
        numbers = sum(
            tensors.count * math.prod(tensors.shape)
            for tensors in parts.trained.with_gradient
        )
        yield Share(
            text=f"of {numbers:,} trained numbers, those that have theirs in "
            f"{estimate.footprint.peak.label}",
            num_bytes=there,
        )
        return
    yield from _by_item(parts.trained.with_gradient)


def _optimizer(estimate: Estimate) -> Iterator[Share]:
    name = estimate.parts.recipe.optimizer
    optimizer = optimizers.find(name)
    found: dict[str, list[int]] = {}
    for tensors in estimate.parts.trained.with_gradient:
        numbers = math.prod(tensors.shape)
        sizes = optimizer.state_bytes(tensors.shape, tensors.item)
        whole = [size for size in sizes if size >= numbers] or list(sizes)
        each = " + ".join(f"{size / numbers:.3g}" for size in whole) or "0"
        entry = found.setdefault(each, [0, 0])
        entry[0] += tensors.count * numbers
        entry[1] += tensors.count * sum(whole)
    for each, (numbers, num_bytes) in found.items():
        yield Share(
            text=f"{name}: {numbers:,} trained numbers x ({each}) B",
            num_bytes=num_bytes,
        )


def _activations(estimate: Estimate) -> Iterator[Share]:
    """What the layers keep, where the peak stands on all of it."""
    footprint, parts = estimate.footprint, estimate.parts
    there = footprint.breakdown["activations"]
    label = footprint.peak.label
    if label.endswith(("optimizer", "clip")):
        made = parts.step if label.endswith("optimizer") else parts.clip
        yield Share(text=f"temporaries of {label}", num_bytes=made)
        return
    kept = round(estimate.step.kept)
    if kept > there:
        text = f"one layer at work, when the others' {kept:,} B are let go"
        yield Share(text=text, num_bytes=there)
        return
    recipe = parts.recipe
    layers = sum(part.group.count for part in parts.groups)
    what = "inputs" if recipe.checkpointing == "full" else "saved tensors"
    yield Share(
        text=f"{layers} layers' {what}: {layers} x {kept // max(layers, 1):,} B for "
        f"{recipe.batch_size} x {recipe.sequence_length} tokens",
        num_bytes=kept,
    )


def _logits(estimate: Estimate) -> Iterator[Share]:
    recipe, vocabulary = estimate.parts.recipe, estimate.parts.architecture.vocab_size
    there = estimate.footprint.breakdown["logits"]
    numbers = recipe.tokens * vocabulary
    yield Share(
        text=f"{recipe.batch_size} x {recipe.sequence_length} x {vocabulary:,} logits "
        f"x {there / numbers:.4g} B",
        num_bytes=there,
    )


def _workspace(estimate: Estimate) -> Iterator[Share]:
    one, _ = workspaces(estimate.parts)
    there = estimate.footprint.breakdown["workspace"]
    threads = "forward's thread" if there == one else "forward's and backward's threads"
    yield Share(text=f"cuBLAS handles of {threads}", num_bytes=there)


def _context(estimate: Estimate) -> Iterator[Share]:
    there = estimate.footprint.breakdown["context"]
    yield Share(text=f"as it is planned for {estimate.parts.gpu.name}", num_bytes=there)


def _whole(name: str) -> Callable[[Estimate], Iterator[Share]]:
    """A term that is one number."""

    def share(estimate: Estimate) -> Iterator[Share]:
        yield Share(text=WORDS[name], num_bytes=estimate.footprint.breakdown[name])

    return share


def _by_item(tensors: tuple[Tensors, ...]) -> Iterator[Share]:
    """Numbers times bytes, by how many bytes a number has."""
    numbers: dict[int, int] = {}
    for one in tensors:
        count = one.count * math.prod(one.shape)
        numbers[one.item] = numbers.get(one.item, 0) + count
    for item, count in numbers.items():
        yield Share(text=f"{count:,} numbers x {item} B", num_bytes=count * item)


_SHARES: Mapping[str, Callable[[Estimate], Iterator[Share]]] = {
    "weights": _weights,
    "quantization_state": _quantization_state,
    "adapters": _adapters,
    "gradients": _gradients,
    "optimizer": _optimizer,
    "activations": _activations,
    "logits": _logits,
    "kv_cache": _whole("kv_cache"),
    "workspace": _workspace,
    "cache": _whole("cache"),
    "context": _context,
    "paged": _whole("paged"),
}
