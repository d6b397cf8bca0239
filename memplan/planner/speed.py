"""How long a step takes beside another recipe's: floating-point operations and bytes.

T tokens in a micro-batch, a linear layer of i inputs and o outputs, L tokens in a
sequence. Each part of a step takes the longer of its operations at the card's bf16 rate
and its bytes at the card's bandwidth (the roofline of Williams et al., 2009); the parts
add up. Kernels reach some share of both, which a ratio cancels where it is the same
share: so what comes out is a ratio between recipes on a card, and no promise in
seconds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memplan import methods, optimizers, quantizations
from memplan.architecture import Architecture, Linear
from memplan.errors import InputError
from memplan.gpu import Gpu
from memplan.planner.modules import adapted_linears, ranks_of
from memplan.recipe import Recipe

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

MULTIPLY_ADD = 2
"""Operations of one multiplication and one addition."""

ATTENTION_PRODUCTS = 2
"""Q K^T and the product with V."""

ATTENTION_BACKWARD = 2.5
"""Backward's operations to forward's in a kernel that makes the scores again: five
products to two (FlashAttention-2, section 4.1)."""

HEAD_FORWARDS = {"chunked": 2, "chunked-nll": 2, "cut": 2}
"""How often a loss multiplies with the head in forward's direction: those that keep no
logits do so again in backward (memplan.losses says which)."""

HOST_BYTES_PER_SECOND = 15.75e9
"""PCIe 3.0 with 16 lanes, the slowest link that cards of the catalog are used with."""

ACTIVE_EXPERT_KEYS = ("num_experts_per_tok", "top_k_experts", "moe_top_k")
"""Names under which configurations say how many experts see a token."""

ASSUMPTIONS = (
    "Kernels are taken to reach the same share of the card's bf16 rate and bandwidth "
    "under both recipes.",
    "Time between kernels, data loading and evaluation are left out; small batches on "
    "a fast card are slower than this says.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One part of a step."""

    name: str
    flops: float = 0.0
    num_bytes: float = 0.0
    """Bytes read and written in the card's memory."""
    host_bytes: float = 0.0
    """Bytes that cross to the host or back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What an optimizer step does, and its time by the roofline of a card."""

    works: tuple[Work, ...]
    tokens: int
    """Tokens in the step, all micro-batches together."""
    gpu: Gpu
    assumptions: tuple[str, ...]

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.works)

    @property
    def num_bytes(self) -> float:
        return sum(work.num_bytes for work in self.works)

    @property
    def seconds(self) -> float:
        """The roofline's time: a lower bound of a real step's, for ratios only."""
        return sum(map(self._seconds, self.works))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def ratio_to(self, other: StepCost) -> float:
        """Tokens a second beside another recipe's on the same card: 2 is twice."""
        return self.tokens_per_second / other.tokens_per_second

    def _seconds(self, work: Work) -> float:
        rate = (self.gpu.bf16_dense_tflops or math.nan) * 1e12
        bandwidth = (self.gpu.memory_bandwidth_gbps or math.nan) * 1e9
        on_card = max(work.flops / rate, work.num_bytes / bandwidth)
        return on_card + work.host_bytes / HOST_BYTES_PER_SECOND


def step_cost(architecture: Architecture, recipe: Recipe, gpu: Gpu) -> StepCost:
    """The work of one optimizer step.

    Raises InputError for a card whose bf16 rate or bandwidth is not known.
    """
    _check_rates(gpu)
    ranks = _ranks(architecture, recipe)
    micro = [
        *_linear_works(architecture, recipe, ranks),
        *_attention_works(architecture, recipe),
        *_head_works(architecture, recipe),
        *_offload_works(architecture, recipe),
    ]
    step = [_times(work, recipe.accumulation) for work in micro]
    return StepCost(
        works=(*step, _optimizer_work(architecture, recipe, ranks)),
        tokens=recipe.tokens * recipe.accumulation,
        gpu=gpu,
        assumptions=(*ASSUMPTIONS, *_notes(recipe)),
    )


def _check_rates(gpu: Gpu) -> None:
    for name, rate in (
        ("bf16 rate", gpu.bf16_dense_tflops),
        ("bandwidth", gpu.memory_bandwidth_gbps),
    ):
        if rate is None:
            raise InputError(
                "--gpu", gpu.name, f"has no known {name}", "name a card of the catalog"
            )


def _notes(recipe: Recipe) -> Iterator[str]:
    if recipe.dtype == "float32" and recipe.autocast == "none":
        yield "Products in float32 are counted at the bf16 rate, which no card reaches."
    if recipe.offload:
        yield "Offloaded checkpoints cross PCIe 3.0 x16 and overlap with nothing."


def _ranks(architecture: Architecture, recipe: Recipe) -> dict[str, int]:
    if recipe.method == "full":
        return {}
    return ranks_of(recipe, adapted_linears(architecture, recipe))


def recomputed_share(recipe: Recipe) -> float:
    """The share of the blocks whose forward runs again in backward."""
    return 1 / recipe.every_n_layers if recipe.checkpointing == "full" else 0.0


def _linear_works(
    architecture: Architecture, recipe: Recipe, ranks: dict[str, int]
) -> Iterator[Work]:
    """Forward, recomputation, and backward of every linear layer but the head.

    A frozen layer's backward is one product, for its inputs; a trained one's is two.
    """
    tokens, width = recipe.tokens, DTYPE_BYTES[recipe.dtype]
    forwards = 1 + recomputed_share(recipe)
    passes = forwards + (2 if recipe.method == "full" else 1)
    dequantised = _dequantised(recipe)
    for (linear, rank), paths in _alike(architecture, ranks).items():
        count = len(paths)
        sides = linear.in_features + linear.out_features
        product = MULTIPLY_ADD * tokens * linear.num_weights
        adapter = MULTIPLY_ADD * tokens * rank * sides
        held = tokens * sides + linear.num_weights
        yield Work(
            name="linear layers",
            flops=count * (passes * product + (forwards + 2) * adapter),
            num_bytes=count * passes * width * held,
        )
        made = sum(dequantised(path, linear) for path in paths)
        yield Work(name="dequantisation", num_bytes=passes * made)
    yield from _expert_works(architecture, recipe, passes)


def _alike(
    architecture: Architecture, ranks: dict[str, int]
) -> dict[tuple[Linear, int], list[str]]:
    """Paths of the linear layers that have the same shape and rank."""
    found: dict[tuple[Linear, int], list[str]] = defaultdict(list)
    for path, linear in architecture.all_linears():
        if linear.kind != "head":
            found[linear, ranks.get(path, 0)].append(path)
    return found


def _dequantised(recipe: Recipe) -> Callable[[str, Linear], int]:
    """What making a layer's weights anew reads and writes; 0 where none are quantised.

    bitsandbytes dequantises a 4-bit layer into a tensor of the compute precision, which
    the product then reads (`MatMul4Bit`).
    """
    scheme = quantizations.find(recipe.quantization)
    width = DTYPE_BYTES[recipe.compute_dtype]
    spared = tuple(f".{name}" for name in recipe.unquantized_modules)

    def of(path: str, linear: Linear) -> int:
        if scheme.bits is None or f".{path}".endswith(spared):
            return 0
        stored = sum(scheme.stored_bytes(linear.num_weights, linear.out_features))
        return stored + linear.num_weights * width

    return of


def _expert_works(
    architecture: Architecture, recipe: Recipe, passes: float
) -> Iterator[Work]:
    """Fused experts: each token multiplies with a few, and all weights are read."""
    width = DTYPE_BYTES[recipe.dtype]
    share = _active_share(architecture)
    for block in architecture.blocks:
        for one in block.parameters:
            if one.kind != "experts":
                continue
            count = one.num_parameters * len(block.layers)
            yield Work(
                name="experts",
                flops=passes * MULTIPLY_ADD * recipe.tokens * count * share,
                num_bytes=passes * count * width,
            )


def _active_share(architecture: Architecture) -> float:
    config = architecture.config.get("text_config") or architecture.config
    for key in ACTIVE_EXPERT_KEYS:
        if isinstance(config.get(key), int) and architecture.num_experts:
            return float(config[key] / architecture.num_experts)
    return 1.0


def _attention_works(architecture: Architecture, recipe: Recipe) -> Iterator[Work]:
    """Scores and their product with the values, causal: half of L x L.

    Eager and math attention write the scores out and read them again.
    """
    passes = 1 + recomputed_share(recipe) + ATTENTION_BACKWARD
    pairs = recipe.batch_size * recipe.sequence_length**2
    for width in _attention_widths(architecture):
        written = 0.0
        if recipe.attention in ("eager", "math"):
            heads = _num_heads(architecture)
            written = 4 * heads * pairs * DTYPE_BYTES[recipe.dtype]
        yield Work(
            name="attention",
            flops=passes * ATTENTION_PRODUCTS * MULTIPLY_ADD * pairs / 2 * width,
            num_bytes=passes * written,
        )


def _attention_widths(architecture: Architecture) -> Iterator[int]:
    """Heads times their size in every layer with attention: what the output takes in.

    The last attention layer of a block projects the heads' outputs back.
    """
    for block in architecture.blocks:
        attention = [one for one in block.linears if one.kind == "attention"]
        if attention:
            yield from [attention[-1].in_features] * len(block.layers)


def _num_heads(architecture: Architecture) -> int:
    config = architecture.config.get("text_config") or architecture.config
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    return int(heads)


def _head_works(architecture: Architecture, recipe: Recipe) -> Iterator[Work]:
    """The product with the head, and the logits where they are written."""
    weights = architecture.vocab_size * architecture.hidden_size
    width = DTYPE_BYTES[recipe.dtype]
    forwards = HEAD_FORWARDS.get(recipe.loss, 1)
    backwards = 2 if recipe.method == "full" else 1
    logits = recipe.tokens * architecture.vocab_size
    # Logits are written, cast to float32, and read by the softmax and its backward.
    written = logits * (2 * width + 4 * 4) if recipe.loss == "full" else 0
    yield Work(
        name="head and loss",
        flops=(forwards + backwards) * MULTIPLY_ADD * recipe.tokens * weights,
        num_bytes=(forwards + backwards) * weights * width + written,
    )


def _offload_works(architecture: Architecture, recipe: Recipe) -> Iterator[Work]:
    """Checkpoints that go to the host in forward and come back in backward."""
    if not recipe.offload or recipe.checkpointing != "full":
        return
    kept = architecture.num_layers * recomputed_share(recipe)
    one = recipe.tokens * architecture.hidden_size * DTYPE_BYTES[recipe.dtype]
    yield Work(name="offloaded checkpoints", host_bytes=2 * kept * one)


def _optimizer_work(
    architecture: Architecture, recipe: Recipe, ranks: dict[str, int]
) -> Work:
    """States and gradients are read, states and parameters written."""
    optimizer = optimizers.find(recipe.optimizer)
    width = DTYPE_BYTES[recipe.adapter_dtype]
    if recipe.method == "full":
        count, width = architecture.total_parameters, DTYPE_BYTES[recipe.dtype]
    else:
        method = methods.find(recipe.method)
        linears = dict(architecture.all_linears())
        count = sum(
            method.trainable_parameters(linears[path], rank)
            for path, rank in ranks.items()
        )
    states = sum(optimizer.state_bytes((count,), width))
    states += optimizer.paged_bytes((count,))
    return Work(name="optimizer", num_bytes=2 * states + 3 * count * width)


def _times(work: Work, count: int) -> Work:
    return Work(
        name=work.name,
        flops=work.flops * count,
        num_bytes=work.num_bytes * count,
        host_bytes=work.host_bytes * count,
    )
