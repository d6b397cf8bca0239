"""Inference in closed form: weights, adapters, keys and values, one layer at work.

B sequences of T tokens are read at once (prefill), then token after token is made
(decode), each from all keys and values so far. Without autograd nothing is kept but
these, so that a layer's tensors are gone when the next one runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from memplan import checks, kernels, quantizations, tapes
from memplan.architecture import Architecture
from memplan.cublas import LT_WORKSPACE_BYTES, workspace_bytes
from memplan.estimator import UNNAMED_CARD, WITHOUT_CACHE
from memplan.estimator.adapters import adapter_bytes
from memplan.estimator.equations import ROUNDING, WORDS, Share, Term
from memplan.estimator.experts import adapts_experts, check_experts
from memplan.estimator.layout import Group, Layout, Role, layout_of
from memplan.estimator.limits import (
    LARGEST_BATCH,
    Limits,
    last_fitting,
    lengths_of,
)
from memplan.estimator.merging import (
    adapted_weights,
    made_bytes,
    making_bytes,
    merge_bytes,
)
from memplan.estimator.polynomials import Sizes, value
from memplan.estimator.regimes import (
    answering_regime,
    first_regime,
    layer_regime,
)
from memplan.estimator.sampling import choosing_bytes, kept_bytes
from memplan.estimator.trained import trained
from memplan.estimator.weights import DTYPE_BYTES, WeightBytes, weight_bytes
from memplan.footprint import CATEGORIES, Footprint, Moment
from memplan.generation import STATIC
from memplan.gpu import Gpu, find_gpu
from memplan.inference import MERGED, NONE, SEPARATE, Inference, loaded_as
from memplan.recipe import Recipe
from memplan.tape import BlockTape, CachedLayer, Heads, ModelTape, Stretch

FUSED_TOKENS = 4
"""Tokens up to which bitsandbytes reads 4-bit weights in its own kernel on every card
(`_GEMM_4BIT_CUSTOM_FLOOR_M`); for more, that depends on shapes and card, and weights
are taken to be dequantised first, which takes more."""

STATES_AT_WORK = 3
"""Tensors of a state's size while the next one is made of it (transformers' recurrent
gated delta rule: what is read, what is added, and the sum)."""

MASK_STEP = 8
"""Numbers at whose multiples the rows of a mask begin (`mem_eff_alignment`)."""

FLOAT_BYTES = 4
HALF_BYTES = 2

SCORE_BYTES = 4
"""Of a score of the eager path's attention, in float32."""

LOADED_DTYPE = "float32"
"""What PEFT makes of half-precision adapters as it loads them
(peft.tuners.tuners_utils, `cast_adapter_dtype`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedLinear:
    """A linear layer of a group, with its forward for many tokens and for few."""

    many: Stretch
    few: Stretch
    in_features: int
    out_features: int
    rank: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PassedGroup:
    """Layers of one kind, their tape, and what they keep of tokens."""

    tape: BlockTape
    linears: tuple[PassedLinear, ...]
    cached: CachedLayer
    rank: int
    """Of adapted experts, whose tape it is in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceParts:
    """Everything about inference that batch and tokens leave as it is."""

    architecture: Architecture
    recipe: Recipe
    inference: Inference
    gpu: Gpu
    layout: Layout
    tape: ModelTape
    heads: tuple[Heads, ...]
    room: int | None
    """Tokens of a static cache; None where keys and values grow."""
    groups: tuple[PassedGroup, ...]
    weights: WeightBytes
    adapters: int
    adapter_file: int
    """Of the adapters as they were saved, which are read beside those they go into."""
    workspace: int


@dataclass(frozen=True, kw_only=True, slots=True)
class InferenceEstimate:
    """Estimated inference: its footprint and the parts that it comes from."""

    footprint: Footprint
    parts: InferenceParts

    @property
    def parameters(self) -> dict[str, int]:
        return {"total": self.parts.architecture.total_parameters, "trainable": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point at which most may be live, above what is always there."""

    activations: Any
    kv_cache: Any = 0
    logits: Any = 0

    @property
    def total(self) -> Any:
        return self.activations + self.kv_cache + self.logits


def run(
    architecture: Architecture,
    recipe: Recipe,
    inference: Inference,
    gpu: Gpu | None = None,
) -> InferenceEstimate:
    """The estimate of a batch of prompts and their answers.

    Prompts are as long as the recipe's sequences. Raises InputError for what cannot
    run, MissingExtraError where a tape has to be traced first.
    """
    inference = inference.settled(architecture, recipe)
    loaded = loaded_as(recipe)
    adapted = inference.adapters != NONE
    notes = checks.check_inference(architecture, loaded, gpu, adapted=adapted)
    notes = (*notes, *inference.notes)
    if adapted:
        check_experts(architecture, loaded)
    card = gpu or find_gpu(UNNAMED_CARD)
    parts = parts_of(architecture, loaded, inference, card)
    footprint = Footprint(
        moments=tuple(moments(parts)),
        context_bytes=gpu.context_bytes if gpu else None,
        capacity_bytes=gpu.capacity_bytes - gpu.reserve_bytes if gpu else None,
        notes=(*notes, WITHOUT_CACHE),
    )
    return InferenceEstimate(footprint=footprint, parts=parts)


def parts_of(
    architecture: Architecture, recipe: Recipe, inference: Inference, gpu: Gpu
) -> InferenceParts:
    """The parts of inference; reads its tapes, and traces those that are missing."""
    held = dataclasses.replace(recipe, adapter_dtype=LOADED_DTYPE)
    first = tapes.model_tape(architecture, first_regime(held))
    beside = inference.adapters == SEPARATE
    room = inference.room(recipe) if inference.cache == STATIC else None
    regime = answering_regime(
        architecture,
        held,
        gpu,
        first,
        experts=beside and adapts_experts(architecture, recipe),
        room=room,
    )
    tape = tapes.model_tape(architecture, regime)
    plain = {
        path: is_plain
        for block in tape.blocks
        for path, is_plain in zip(block.holes, block.plain, strict=True)
    }
    layout = layout_of(architecture, recipe, plain)
    stack = architecture.main_stack
    kinds = [block for block in architecture.blocks if block.stack == stack]
    cached = tapes.cache_tape(architecture).layers
    item = DTYPE_BYTES[recipe.dtype]
    biased = any(role.linear.bias for role, _ in layout.linears)
    return InferenceParts(
        architecture=architecture,
        recipe=recipe,
        inference=inference,
        gpu=gpu,
        layout=layout,
        tape=tape,
        heads=first.attention,
        room=room,
        groups=tuple(
            _group(group, tape.blocks[kind], _share(cached[kind], group, item), held)
            for group in (layout if beside else _without_adapters(layout)).groups
            if group.block.stack == stack
            for kind in [kinds.index(group.block)]
        ),
        weights=weight_bytes(architecture, layout, recipe),
        adapters=_adapter_bytes(architecture, layout, held, inference),
        adapter_file=_adapter_bytes(architecture, layout, recipe, inference),
        workspace=workspace_bytes(gpu) + (LT_WORKSPACE_BYTES if biased else 0),
    )


def _adapter_bytes(
    architecture: Architecture, layout: Layout, recipe: Recipe, inference: Inference
) -> int:
    if inference.adapters == NONE:
        return 0
    tensors = trained(architecture, layout, recipe, architecture.main_stack)
    return adapter_bytes(layout, recipe, tensors)


def _without_adapters(layout: Layout) -> Layout:
    def frozen(roles: tuple[Role, ...]) -> tuple[Role, ...]:
        return tuple(
            dataclasses.replace(role, adapted=False, rank=0, options=())
            for role in roles
        )

    return Layout(
        groups=tuple(
            dataclasses.replace(group, roles=frozen(group.roles))
            for group in layout.groups
        ),
        outside=frozen(layout.outside),
    )


def _share(cached: CachedLayer, group: Group, item: int) -> CachedLayer:
    """Of the layers of a kind that keep tokens, those of a group.

    The tape is of half precision; states that do not grow stay in their own.
    """
    whole = len(group.block.layers)
    factor = item // HALF_BYTES
    return dataclasses.replace(
        cached,
        count=cached.count * group.count // whole,
        tensors=tuple(
            {word: n * factor if "T" in word else n for word, n in tensor.items()}
            for tensor in cached.tensors
        ),
    )


def _group(
    group: Group, tape: BlockTape, cached: CachedLayer, recipe: Recipe
) -> PassedGroup:
    roles = {role.linear.path: role for role in group.roles}
    linears = []
    for path, input_dtype in zip(tape.holes, tape.input_dtypes, strict=True):
        role = roles[path]
        frozen = dataclasses.replace(recipe, method="lora")
        regime = layer_regime(recipe if role.adapted else frozen, role, input_dtype)
        is_4bit = role.quantized and "4bit" in (_flag(recipe) or "")
        linears.append(
            PassedLinear(
                many=tapes.pass_tape(regime, fused=False),
                few=tapes.pass_tape(regime, fused=is_4bit),
                in_features=role.linear.in_features,
                out_features=role.linear.out_features,
                rank=role.rank,
            )
        )
    return PassedGroup(
        tape=tape, linears=tuple(linears), cached=cached, rank=recipe.rank
    )


def _flag(recipe: Recipe) -> str | None:
    return quantizations.find(recipe.quantization).loading_flag


def kv_bytes(parts: InferenceParts, batch: Any, tokens: Any) -> Any:
    """K = sum over layers of B (k + v) min(T, W) b, and what grows with no token.

    k and v are the numbers of a token's key and value, W is the window of sliding
    layers, and b the bytes of a number. A prompt longer than a window is kept whole
    until the first token is made, since what is cut off shares its storage.
    """
    return sum(
        group.cached.count * layer_kv_bytes(group.cached, batch, tokens)
        for group in parts.groups
    )


def layer_kv_bytes(cached: CachedLayer, batch: Any, tokens: Any) -> Any:
    """One layer's part of it."""
    sizes = Sizes({"": 1, "B": batch, "T": tokens})
    return sum(value(tensor, sizes) for tensor in cached.tensors)


def windowed_kv_bytes(parts: InferenceParts, batch: Any, tokens: Any) -> Any:
    """K once tokens come one by one, where sliding layers keep their window alone.

    A static cache is so from the start, for as many tokens as it has room for.
    """
    return sum(
        group.cached.count
        * layer_kv_bytes(group.cached, batch, _seen(group.cached, tokens))
        for group in parts.groups
    )


def _seen(cached: CachedLayer, tokens: int) -> int:
    return tokens if cached.window is None else min(cached.window, tokens)


def joined_bytes(parts: InferenceParts, batch: int, tokens: int) -> Any:
    """The largest tensor that is joined to one more token: it lives beside the new.

    A static cache is written in place, but moved on where its window is full: then a
    layer's keys and values are copied (cache_utils, StaticSlidingWindowLayer).
    """
    growing = (group.cached for group in parts.groups if group.cached.grows)
    found = [
        [value(tensor, _sizes(batch, _seen(cached, tokens))) for tensor in each]
        for cached in growing
        for each in [cached.tensors]
        if parts.room is None or (cached.window or tokens) < tokens
    ]
    if parts.room is None:
        return max((size for sizes in found for size in sizes), default=0)
    return max(map(sum, found), default=0)


def _sizes(batch: int, tokens: int, *, rank: int = 0, room: int | None = None) -> Sizes:
    """The dimensions of the model's tapes.

    A mask's rows are copied where they do not begin at multiples of 8
    (attention.cpp, `pad_bias`).
    """
    room = room or 0
    missing = -room % MASK_STEP
    return Sizes(
        {
            "": 1,
            "B": batch,
            "T": tokens,
            "r": rank,
            "L": room,
            "P": room + missing if missing else 0,
        }
    )


def layer_peak(
    group: PassedGroup, batch: int, tokens: int, room: int | None = None
) -> Any:
    """The most that a layer holds while it runs over B sequences of T tokens.

    Its input is counted: the caller holds that until the layer returns, and the
    embeddings, which `start` has, until the last one does.
    """
    seen = None if room is None else _seen(group.cached, room)
    sizes = _sizes(batch, tokens, rank=group.rank, room=seen)
    count = batch * tokens
    live: Any = 0
    peak: Any = 0
    for item in group.tape.forward:
        if isinstance(item, Stretch):
            peak = max(peak, *(live + value(each, sizes) for each in item.peaks), live)
            live += value(item.net, sizes)
        elif item.kind == "F":
            linear = group.linears[item.holes[0]]
            passed = linear.few if count <= FUSED_TOKENS else linear.many
            inner = Sizes(
                {
                    "": 1,
                    "N": count,
                    "i": linear.in_features,
                    "o": linear.out_features,
                    "r": linear.rank,
                }
            )
            peak = max(peak, *(live + value(each, inner) for each in passed.peaks))
            live += value(passed.net, inner)
        else:
            live -= value(item.size, sizes)
    return live + max(peak, live)


def new_token_peak(
    parts: InferenceParts, group: PassedGroup, batch: int, tokens: int
) -> Any:
    """The most that a layer holds while it reads one token after so many.

    Layers that keep states instead of keys compute the next one beside two
    intermediate results of its size.
    """
    if not group.cached.grows:
        return STATES_AT_WORK * layer_kv_bytes(group.cached, batch, tokens)
    attention = attention_bytes(parts, group.cached, batch, tokens)
    return layer_peak(group, batch, 1) + attention


def attention_bytes(
    parts: InferenceParts, cached: CachedLayer, batch: int, tokens: int
) -> Any:
    """What one new token's attention holds beside the keys and values of T tokens.

    The eager path holds B h T scores in the model's precision twice and in float32;
    where h heads share g, each gets its own copy of keys and values: B h T (q + v) b.
    PyTorch's math path works on copies in float32, and scales the keys:
    4 B T (h q + (h + g) (q + v)), of g heads alone where queries that share keys are
    packed, as they are beside a mask (transformers.integrations.sdpa_attention).
    """
    item = DTYPE_BYTES[parts.recipe.dtype]
    query, dims = _heads(parts)
    seen = _seen(cached, tokens)
    there = layer_kv_bytes(cached, batch, seen)
    own = batch * query * dims * seen * item
    grouped = own > there > 0
    if parts.recipe.attention == "eager" or not parts.heads:
        scores = batch * query * seen * (2 * item + SCORE_BYTES)
        return scores + (own if grouped else 0)
    hidden = (cached.window or tokens + 1) <= tokens
    masked = parts.recipe.padded or hidden or parts.room is not None
    may_share = any(one.grouped for one in parts.heads)
    shares, packs = may_share and not masked, may_share and masked
    kernel = _kernel(
        parts, batch, seen, masked=masked, grouped=grouped and shares, packs=packs
    )
    repeats = grouped and not may_share
    if kernel != "math":
        return own if repeats else 0
    casts = 0 if item == FLOAT_BYTES else there // item * FLOAT_BYTES
    whole = (there if packs else own) // item * FLOAT_BYTES
    return casts + (whole if grouped and not packs else 0) + whole // 2


def _kernel(  # noqa: PLR0913 - each decides which it is
    parts: InferenceParts,
    batch: int,
    tokens: int,
    *,
    masked: bool,
    grouped: bool,
    packs: bool,
) -> str:
    """The kernel that attends to so many tokens from one."""
    heads = parts.heads[0]
    key = heads.query if heads.grouped and not (grouped or packs) else heads.key
    return kernels.choose(
        "auto" if masked else parts.recipe.attention,
        kernels.Shapes(
            query=(
                (batch, key, heads.query // key, heads.query_dim)
                if packs
                else (batch, heads.query, 1, heads.query_dim)
            ),
            key=(batch, key, tokens, heads.query_dim),
            value=(batch, key, tokens, heads.value_dim),
            dtype=parts.recipe.dtype,
            masked=masked,
            causal=False,
            dropout=0.0,
            grouped=grouped,
            dense_rows=heads.dense_rows,
            trains=False,
        ),
        parts.gpu,
    )


def _heads(parts: InferenceParts) -> tuple[int, int]:
    """Query heads, and the numbers of a head's key and value."""
    if parts.heads:
        widest = max(parts.heads, key=lambda one: one.query * one.query_dim)
        return widest.query, widest.query_dim + widest.value_dim
    config = parts.architecture.config
    config = config.get("text_config", config)
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    dim = config.get("head_dim") or parts.architecture.hidden_size // heads
    return heads, 2 * dim


def logit_bytes(parts: InferenceParts, batch: int) -> int:
    """B V b: the last token's logits, made while the hidden states are there."""
    return batch * parts.architecture.vocab_size * DTYPE_BYTES[parts.recipe.dtype]


def chosen_bytes(parts: InferenceParts, batch: int, *, later: bool) -> int:
    """L: the last token's logits, and what the token is chosen by."""
    vocabulary = parts.architecture.vocab_size
    item = DTYPE_BYTES[parts.recipe.dtype]
    return choosing_bytes(
        parts.inference.sampling, batch, vocabulary, item, later=later
    )


def prefill_points(parts: InferenceParts) -> Iterator[Point]:
    """The embedding, the last layer of each kind, the norm, and the last logits.

    All layers before the last keep their keys and values by then.
    """
    batch, tokens = parts.recipe.batch_size, parts.recipe.sequence_length
    sizes = _sizes(batch, tokens, room=parts.room)
    start = value(parts.tape.before.net, sizes)
    kept = (
        kv_bytes(parts, batch, tokens)
        if parts.room is None
        else windowed_kv_bytes(parts, batch, parts.room)
    )
    for peak in parts.tape.before.peaks:
        yield Point(activations=value(peak, sizes))
    for group in parts.groups:
        at_work = layer_peak(group, batch, tokens, parts.room)
        yield Point(activations=start + at_work, kv_cache=kept)
    norm = parts.tape.tail[0]
    if isinstance(norm, Stretch):
        for peak in norm.peaks:
            yield Point(activations=start + value(peak, sizes), kv_cache=kept)
        start += value(norm.net, sizes)
    chosen = chosen_bytes(parts, batch, later=False)
    yield Point(activations=start, kv_cache=kept, logits=logit_bytes(parts, batch))
    yield Point(activations=0, kv_cache=kept, logits=chosen)


def decode_points(parts: InferenceParts) -> Iterator[Point]:
    """The first new token, where prompts outgrow windows, and the last one.

    A token's layers hold little; what its attention or a dequantised weight takes, or
    the old keys beside the new ones, is the most of it.
    """
    batch, prompt = parts.recipe.batch_size, parts.recipe.sequence_length
    last = prompt + parts.inference.num_tokens - 1
    vocabulary = parts.architecture.vocab_size
    scores = kept_bytes(parts.inference.sampling, batch, vocabulary)
    at_work = max(new_token_peak(parts, group, batch, last) for group in parts.groups)
    kept = windowed_kv_bytes(parts, batch, last)
    first = kv_bytes(parts, batch, prompt) if parts.room is None else kept
    joined = joined_bytes(parts, batch, last)
    for keys in (first, kept):
        yield Point(activations=at_work, kv_cache=keys, logits=scores)
        yield Point(activations=0, kv_cache=keys + joined, logits=scores)
    chosen = chosen_bytes(parts, batch, later=True)
    yield Point(activations=0, kv_cache=kept, logits=chosen)


def moments(parts: InferenceParts) -> Iterator[Moment]:
    """Load, adaptation, merging, reading and answering.

    Reserved bytes never fall, as the allocator keeps what it has reserved.
    """
    reserved = parts.weights.reserved
    for moment in _moments(parts):
        reserved = max(reserved, moment.allocated_bytes)
        yield dataclasses.replace(moment, reserved_bytes=reserved)


def _moments(parts: InferenceParts) -> Iterator[Moment]:
    adapters = parts.adapters
    load = Point(activations=parts.weights.load_peak - parts.weights.total)
    yield _moment(parts, "load", load, adapters=0, workspace=0)
    if parts.inference.adapters != NONE:
        yield _adapt(parts)
    if parts.inference.adapters == MERGED:
        weights = [*adapted_weights(parts.architecture, parts.layout, parts.recipe)]
        merging = Point(activations=merge_bytes(weights, parts.recipe))
        yield _moment(parts, "merge", merging, adapters=adapters)
    beside = adapters if parts.inference.adapters == SEPARATE else 0
    yield _moment(parts, "prefill", _most(prefill_points(parts)), adapters=beside)
    if parts.inference.num_tokens > 1:
        yield _moment(parts, "decode", _most(decode_points(parts)), adapters=beside)


def _adapt(parts: InferenceParts) -> Moment:
    """Adapters are made in their weights' precision, then those of a file are read.

    PEFT copies those onto the ones that it has made single by then
    (peft.PeftModel.load_adapter).
    """
    weights = [*adapted_weights(parts.architecture, parts.layout, parts.recipe)]
    making = making_bytes(weights, parts.recipe)
    made = made_bytes(weights, parts.adapters)
    read = parts.adapter_file + parts.adapters
    point, held = (making, made) if making + made > read else (0, read)
    return _moment(
        parts,
        "adapt",
        Point(activations=point),
        adapters=held,
        workspace=workspace_bytes(parts.gpu) if making else 0,
    )


def _most(points: Iterator[Point]) -> Point:
    return max(points, key=lambda point: point.total)


def _moment(
    parts: InferenceParts,
    label: str,
    point: Point,
    *,
    adapters: int,
    workspace: int | None = None,
) -> Moment:
    found = {
        "weights": parts.weights.weights,
        "quantization_state": parts.weights.state,
        "adapters": adapters,
        "activations": point.activations,
        "logits": point.logits,
        "kv_cache": point.kv_cache,
        "workspace": parts.workspace if workspace is None else workspace,
    }
    breakdown = {name: round(found.get(name, 0)) for name in CATEGORIES}
    allocated = sum(breakdown.values())
    return Moment(
        label=label,
        allocated_bytes=allocated,
        reserved_bytes=allocated,
        breakdown=breakdown,
    )


def limits(estimate: InferenceEstimate, gpu: Gpu) -> Limits:
    """The most prompts, and the longest ones, that still fit."""
    parts = estimate.parts
    recipe = parts.recipe

    def margin(batch: int, length: int) -> int:
        asked = dataclasses.replace(recipe, batch_size=batch, sequence_length=length)
        found = parts_of(parts.architecture, asked, parts.inference, gpu)
        return gpu.budget_bytes - max(m.reserved_bytes for m in moments(found))

    return Limits(
        batch_size=last_fitting(
            lambda batch: margin(batch, recipe.sequence_length),
            range(1, LARGEST_BATCH + 1),
            start=recipe.batch_size,
        ),
        sequence_length=last_fitting(
            lambda length: margin(recipe.batch_size, length),
            lengths_of(parts.architecture),
            start=recipe.sequence_length,
        ),
    )


def inference_terms(estimate: InferenceEstimate) -> tuple[Term, ...]:
    """The terms of the peak that are not empty, with the numbers put in."""
    return tuple(
        Term(
            name=name,
            num_bytes=num_bytes,
            words=_WORDS.get(name, WORDS[name]),
            shares=tuple(_shares(estimate.parts, name, num_bytes)),
        )
        for name, num_bytes in estimate.footprint.breakdown.items()
        if num_bytes
    )


_WORDS = {
    "activations": "one layer at work",
    "logits": "B V x bytes, and what a token is chosen by",
    "workspace": "cuBLAS, for the thread that multiplies",
}
"""Where inference differs from training."""


def _shares(parts: InferenceParts, name: str, num_bytes: int) -> Iterator[Share]:
    told = _TOLD.get(name)
    if told is None:
        yield Share(text=_WORDS.get(name, WORDS[name]), num_bytes=num_bytes)
        return
    left = num_bytes
    for share in told(parts):
        taken = min(left, share.num_bytes)
        left -= taken
        yield dataclasses.replace(share, num_bytes=taken)
    if left:
        yield Share(text=_REST.get(name, ROUNDING), num_bytes=left)


_REST = {"kv_cache": "tokens of the answer, and the old keys beside the new ones"}


def _told_cache(parts: InferenceParts) -> Iterator[Share]:
    batch = parts.recipe.batch_size
    for group in parts.groups:
        each = round(layer_kv_bytes(group.cached, batch, 1))
        tokens = (
            parts.recipe.sequence_length
            if parts.room is None
            else _seen(group.cached, parts.room)
        )
        whole = round(layer_kv_bytes(group.cached, batch, tokens))
        yield Share(
            text=f"{group.cached.count} layers x {tokens:,} tokens x {each:,} B",
            num_bytes=group.cached.count * whole,
        )


def _told_adapters(parts: InferenceParts) -> Iterator[Share]:
    architecture = parts.architecture
    stack = architecture.main_stack
    tensors = trained(architecture, parts.layout, parts.recipe, stack)
    count = tensors.num_parameters
    text = f"{count:,} numbers x {FLOAT_BYTES} B"
    yield Share(text=text, num_bytes=count * FLOAT_BYTES)


_TOLD: dict[str, Callable[[InferenceParts], Iterator[Share]]] = {
    "kv_cache": _told_cache,
    "adapters": _told_adapters,
}
