"""Tapes: what a model's parts allocate and release, with sizes as polynomials.

A tape is read off one real step on meta tensors. Its sizes are polynomials of the batch
B and the sequence T, so that one tape stands for every batch of its regime. Linear
layers are holes in a model's tape: what happens in them depends on method and
quantisation, and has a tape of its own, in tokens N = B T, inputs i, outputs o and rank
r.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Polynomial = Mapping[str, float]
"""Bytes by monomial, which is a word over the dimensions' letters: `BT`, `BTT`, `Nr`;
the empty word is the constant."""

DYNAMIC = "dynamic"
STATIC = "static"
STATIC_WINDOW = "static-window"
"""How prompts are read, in regimes of answers."""

LOSS = -1
"""The number of the hole that head and loss are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What a model's tape depends on besides batch and sequence."""

    dtype: str
    """Of the parameters outside of linear layers, as trained."""
    autocast: str
    casts_output: bool
    """Whether linear layers return autocast's precision, not their input's."""
    attention: str
    """The kernel of attention without a mask, or `eager`."""
    masked_attention: str
    """The kernel of attention with a mask."""
    padded: bool
    windowed: bool
    """Whether sequences are longer than the windows of sliding attention."""
    trained: bool
    """Whether the parameters outside of linear layers are trained."""
    checkpointed: bool
    card: str = ""
    """A card whose kernels' scratch it is; empty for that of most cards."""
    outputs: tuple[tuple[str, str], ...] = ()
    """Precisions of what linear layers return that are neither, by paths in a layer:
    adapters may promote what they add to."""
    experts: str = ""
    """The targets that adapt stacked experts too, and the adapters' precision."""
    answers: str = ""
    """How prompts are read where nothing is trained, or dropped out: `dynamic`; into
    the room of a `static` cache; into one that is no shorter than a sliding window,
    which prompts are, in `static-window`."""

    def casts(self, *, is_plain: bool) -> bool:
        """Whether a linear layer returns autocast's precision, not its input's.

        One that is not plain is never quantised, so that autocast casts it always.
        """
        return self.casts_output or (self.autocast != "none" and not is_plain)

    @property
    def key(self) -> str:
        """The name under which the tape is kept."""
        flags = ("casts_output", "padded", "windowed", "trained", "checkpointed")
        on = [flag for flag in flags if getattr(self, flag)]
        kernels = f"{self.attention}/{self.masked_attention}"
        outputs = [f"{path}={dtype}" for path, dtype in self.outputs]
        if self.experts:
            outputs.append(f"experts:{self.experts}")
        if self.answers:
            outputs.append(f"answers:{self.answers}")
        told = (self.dtype, self.autocast, kernels, *on, self.card.replace(" ", "-"))
        return " ".join(word for word in (*told, *outputs) if word)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """What happens between two marks: the peaks within it and what is left after it."""

    net: Polynomial
    """Bytes that are live after the stretch and were not before it."""
    peaks: tuple[Polynomial, ...]
    """Bytes above the start where most are live; the largest of these counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A hole's forward or backward, or where the input of holes is dropped."""

    kind: str
    """`F`, `B`, or `drop`; in the backward of a linear layer, `x` where it is done with
    its input and `y` where it is done with its output's gradient."""
    holes: tuple[int, ...] = ()
    """Numbers of the holes: one, or all that share the dropped input."""
    size: Polynomial = dataclasses.field(default_factory=dict)
    """Bytes that are dropped: by `B`, the output's gradient, if it is the hole's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRegime:
    """What a linear layer's tape depends on besides its dimensions."""

    method: str
    """The method that adapts the layer; `full` trains it, `frozen` leaves it alone."""
    quantization: str
    dtype: str
    """Of the weights, as loaded."""
    input_dtype: str
    autocast: str
    compute_dtype: str
    adapter_dtype: str
    input_casts: bool
    dropout: bool
    bias: bool
    by_trl: bool = False
    """Whether SFTTrainer casts the adapters, which leaves DoRA's magnitudes alone."""
    options: str = ""
    """The method's options for the layer, as JSON; empty where it has none."""

    @property
    def key(self) -> str:
        """The name under which the tape is kept."""
        flags = ("input_casts", "dropout", "bias", "by_trl")
        on = [flag for flag in flags if getattr(self, flag)]
        names = ("method", "quantization", "dtype", "input_dtype", "autocast")
        types = ("compute_dtype", "adapter_dtype")
        told = (*(getattr(self, name) for name in (*names, *types)), *on)
        return " ".join((*told, self.options)).rstrip()


Tape = tuple[Stretch | Mark, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTape:
    """A layer's forward and backward; under checkpointing the latter recomputes."""

    holes: tuple[str, ...]
    """Paths of the linear layers within the layer, by their numbers."""
    input_dtypes: tuple[str, ...]
    """Precisions of what they are given."""
    plain: tuple[bool, ...]
    """Whether they are plain linear layers, which alone are quantised."""
    forward: Tape
    backward: Tape
    kept: tuple[Polynomial, ...]
    """Blocks that the layer keeps from forward to backward, its holes' left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heads:
    """The heads of an attention, on which the kernel depends that takes them."""

    query: int
    key: int
    query_dim: int
    value_dim: int
    grouped: bool
    """Whether the kernel is given fewer key than query heads."""
    dense_rows: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTape:
    """A step of a model in one regime, its layers once for each kind."""

    attention: tuple[Heads, ...]
    """What attention is given; that without a mask first, none where it is eager."""
    window: int | None
    """Tokens that sliding attention sees, None where there is none."""
    before: Stretch
    """From the batch to the first layer's input."""
    hidden_dtype: str
    """The precision of the last hidden states, which the head is given."""
    blocks: tuple[BlockTape, ...]
    """By the kinds of layers of the architecture's stack, in their order."""
    tail: Tape
    """From the last layer's output to its gradient, head and loss being a hole."""
    after: Stretch
    """From the gradient of the first layer's input to the end of backward."""
    carried: Polynomial = dataclasses.field(default_factory=dict)
    """What each layer hands on and the next one releases, as eager attention's scores,
    so that there is one more of it than layers give back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTape:
    """A linear layer as a method and a quantisation make it."""

    forward: Stretch
    """Its net includes the output and what is kept for backward."""
    passing: Stretch
    """The forward of a checkpoint's first run, which keeps nothing for backward."""
    backward: Tape
    """It makes the input's gradient, and releases what forward kept."""
    cached: Polynomial
    """What a checkpoint's first forward leaves to autocast's cache of weights."""
    holds_input: bool
    """Whether the input itself is kept for backward."""
    sticks: bool
    """Whether the input is kept as long as the graph, checkpointed or not, as
    bitsandbytes' int8 product keeps it on its context."""
    stuck: Polynomial
    """What else is kept as long as the graph: an int8 product's own input."""
    output_dtype: str
    kept: tuple[Polynomial, ...]
    """Blocks that are kept from forward to backward."""
    ahead: Polynomial
    """What backward has made before it asks for what forward kept, as the product with
    an adapter's scale, and a checkpoint computes that again."""
    again: Stretch
    """That forward, which stops once all that backward asks for is there; its net is
    that of one that goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedLayer:
    """What generation keeps of the tokens that a layer of some kind has read."""

    count: int
    """How many layers of the kind do; others may read what an earlier one keeps."""
    tensors: tuple[Polynomial, ...]
    """Keys and values, in sequences B and tokens T; states without T do not grow."""
    window: int | None
    """The most tokens that are kept once tokens come one by one; None for all."""
    grows: bool
    """Whether a new token makes a tensor anew, joined from the old one and its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTape:
    """What a model's layers keep, by the kinds of its architecture's stack."""

    layers: tuple[CachedLayer, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTape:
    """The head and the loss, from the last hidden states and back to their gradient.

    Numbers are bytes at so many tokens as `tokens` says, and lie on straight lines
    between and beyond.
    """

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    """What is live after forward."""
    left: tuple[int, ...]
    """What is live after backward, where the caller holds the output."""
    forward_peak: tuple[int, ...]
    """The most that is live in forward."""
    backward_peak: tuple[int, ...]
    """The most that is live in backward."""
    head_peak: tuple[int, ...]
    """The most that is live from the moment that the head has its gradient, which is
    left out; nothing where it has none."""
    head_in_forward: bool
    """Whether it has it already in forward, as Liger's loss makes it."""
    logits: tuple[int, ...]
    """What of the larger of these two is logits."""
    holds_input: bool
    """Whether the hidden states are kept for backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossRegime:
    """What the tape of head and loss depends on."""

    loss: str
    dtype: str
    """Of the head, but for a quantised one."""
    hidden_dtype: str
    """Of the hidden states."""
    autocast: str
    float32_outputs: bool
    """Whether a trainer hands outputs on in float32."""
    trained: bool
    """Whether the head is trained."""
    keeps_output: bool
    """Whether the caller holds the model's output through backward."""

    @property
    def key(self) -> str:
        """The name under which the tape is kept."""
        flags = ("float32_outputs", "trained", "keeps_output")
        on = [flag for flag in flags if getattr(self, flag)]
        types = (self.dtype, self.hidden_dtype, self.autocast)
        return " ".join((self.loss, *types, *on))


def to_json(value: Any) -> Any:
    """A tape, or a part of one, as lists and mappings; what is empty is left out."""
    if isinstance(value, Stretch):
        return [dict(value.net), [dict(peak) for peak in value.peaks]]
    if isinstance(value, Mark):
        return [value.kind, list(value.holes), dict(value.size)]
    if dataclasses.is_dataclass(value):
        return {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def model_tape(data: Mapping[str, Any]) -> ModelTape:
    """The tape that `to_json` wrote."""
    return ModelTape(
        attention=tuple(Heads(**heads) for heads in data["attention"]),
        window=data["window"],
        before=_stretch(data["before"]),
        hidden_dtype=data["hidden_dtype"],
        blocks=tuple(_block(block) for block in data["blocks"]),
        tail=_tape(data["tail"]),
        after=_stretch(data["after"]),
        carried=data["carried"],
    )


def layer_tape(data: Mapping[str, Any]) -> LayerTape:
    """The tape that `to_json` wrote."""
    return LayerTape(
        forward=_stretch(data["forward"]),
        passing=_stretch(data["passing"]),
        backward=_tape(data["backward"]),
        cached=data["cached"],
        holds_input=data["holds_input"],
        sticks=data["sticks"],
        stuck=data["stuck"],
        output_dtype=data["output_dtype"],
        kept=tuple(data["kept"]),
        ahead=data["ahead"],
        again=_stretch(data["again"]),
    )


def pass_tape(data: Sequence[Any]) -> Stretch:
    """The forward of a linear layer without autograd that `to_json` wrote."""
    return _stretch(data)


def cache_tape(data: Mapping[str, Any]) -> CacheTape:
    """The tape that `to_json` wrote."""
    return CacheTape(
        layers=tuple(
            CachedLayer(**one | {"tensors": tuple(one["tensors"])})
            for one in data["layers"]
        )
    )


def loss_tape(data: Mapping[str, Any]) -> LossTape:
    """The tape that `to_json` wrote."""
    told: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in data.items()
    }
    return LossTape(**told)


def _block(data: Mapping[str, Any]) -> BlockTape:
    return BlockTape(
        holes=tuple(data["holes"]),
        input_dtypes=tuple(data["input_dtypes"]),
        plain=tuple(data["plain"]),
        forward=_tape(data["forward"]),
        backward=_tape(data["backward"]),
        kept=tuple(data["kept"]),
    )


def _tape(data: Sequence[Any]) -> Tape:
    return tuple(
        Mark(kind=item[0], holes=tuple(item[1]), size=item[2])
        if isinstance(item[0], str)
        else _stretch(item)
        for item in data
    )


def _stretch(data: Sequence[Any]) -> Stretch:
    net, peaks = data
    return Stretch(net=net, peaks=tuple(peaks))
