"""A model's tape: one step of a short copy of it, its linear layers holes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D

from memplan import kernels
from memplan.architecture import Architecture, Block
from memplan.gpu import Gpu, find_gpu
from memplan.inspector import build_config
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.simulator import no_initialization, no_warnings
from memplan.simulator.events import FREE, MARK, EventLog
from memplan.simulator.reroute import Reroute
from memplan.simulator.taping.holes import (
    Event,
    Hole,
    HoleMark,
    TapeTracer,
    let_go_of,
)
from memplan.simulator.taping.polynomials import (
    BATCH,
    LENGTHS,
    RANK,
    ROOMS,
    add,
    hides_length,
    largest,
    sizes_in_batch,
)
from memplan.simulator.taping.tracks import ModelTracks
from memplan.tape import (
    LOSS,
    STATIC,
    STATIC_WINDOW,
    BlockTape,
    Heads,
    Mark,
    ModelTape,
    Polynomial,
    Regime,
    Stretch,
    Tape,
)
from memplan.track import ModelTrack
from memplan.training import model as training_model
from memplan.training.attention import repeated_heads
from memplan.training.batch import make_batch
from memplan.training.few_layers import KeptLayers, build_few
from memplan.training.step import autocast

LAYERS_OF_A_KIND = 3
"""The one in the middle is read: its neighbours are as those of most layers are."""

CARD = "80GB"
"""The card whose kernels' scratch is read: capability 8.6."""

WINDOW = 128
"""The window of sliding attention in sequences that are longer than it."""

ROOM, _ = ROOMS["L"]

NO_WINDOW = 2**20
"""The window of sliding attention in sequences that are shorter than it."""


@dataclass(slots=True)
class _Run:
    """A traced step."""

    log: EventLog
    marks: list[tuple[int, HoleMark]]
    positions: dict[int, int]
    """By hole: the position of its layer."""
    numbers: dict[int, int]
    """By hole: its number among those of its layer."""
    paths: dict[int, list[str]]
    """By position of a layer: the paths of its holes in it."""
    stack: str
    kept: list[int]
    """By position: the layer's number."""
    calls: list[kernels.Shapes]
    """What attention was given."""
    input_dtypes: dict[int, str]
    """By hole: the precision of its input."""
    plain: dict[int, bool]
    """By hole: whether it stands for a plain linear layer."""
    window: int | None
    sizes: list[Polynomial] = field(default_factory=list)
    """By block."""


def trace_model(architecture: Architecture, regime: Regime) -> ModelTape:
    """The tape of a model in a regime."""
    parser, read = _parser(architecture, regime)
    return parser.parse(read)


def track_model(architecture: Architecture, regime: Regime) -> ModelTrack:
    """The track of a model in a regime."""
    parser, read = _parser(architecture, regime)
    return parser.track(read)


def _parser(architecture: Architecture, regime: Regime) -> tuple[_Parser, list[int]]:
    """The step taken apart, and the positions of the layers to read."""
    key = (id(architecture), regime.key)
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = (architecture, *_parse(architecture, regime))
    _, parser, read = _LAST[key]
    return parser, read


_LAST: dict[tuple[int, str], tuple[Architecture, _Parser, list[int]]] = {}
"""The last step that was traced: tape and track are read off one and the same."""


def _parse(architecture: Architecture, regime: Regime) -> tuple[_Parser, list[int]]:
    stack = architecture.main_stack
    blocks = [block for block in architecture.blocks if block.stack == stack]
    kept = _kept_layers(blocks)
    run = _run(architecture, regime, stack, kept, LENGTHS[0])
    second = None
    if any(hides_length(size) for size in run.log.sizes):
        second = _run(architecture, regime, stack, kept, LENGTHS[1]).log
    run.sizes = sizes_in_batch(run.log, second, has_room=_is_static(regime))
    read = [_layer_to_read(block, kept) for block in blocks]
    return _Parser(run, len(kept)), read


def _kept_layers(blocks: list[Block]) -> list[int]:
    return sorted(
        layer for block in blocks for layer in block.layers[:LAYERS_OF_A_KIND]
    )


def _layer_to_read(block: Block, kept: list[int]) -> int:
    """The position of the second of its kind, or of the only one."""
    layers = [layer for layer in block.layers if layer in kept]
    return kept.index(layers[min(1, len(layers) - 1)])


def _run(
    architecture: Architecture,
    regime: Regime,
    stack: str,
    kept: list[int],
    length: int,
) -> _Run:
    recipe = _recipe(regime, length)
    log = EventLog()
    calls: list[kernels.Shapes] = []
    gpu = find_gpu(regime.card or CARD)
    tracer = TapeTracer(gpu, log, padded=regime.padded)
    tracer.vocab_size = architecture.vocab_size
    with no_warnings(), no_initialization():
        model = _short_model(architecture, recipe, regime, stack, kept)
        model.requires_grad_(regime.trained)
        if regime.experts:
            _adapt_experts(model, architecture, regime)
        plain = _plain(model.get_submodule(stack))
        holes = _dig(model.get_submodule(stack), tracer, regime)
        training_model.prepare(model, recipe)
        if regime.answers:
            model.eval()
        else:
            _require_gradient(model)
            model.train()
        with (
            Reroute(tracer, recipe).installed(),
            _kernels(regime, calls),
            repeated_heads(regime.attention),
            tracer,
        ):
            for tensor in (*model.parameters(), *model.buffers()):
                tracer.ignore(tensor)
            tracer.name_modules(model)
            if regime.answers:
                _read(model, recipe, _cache(architecture, regime), architecture, tracer)
            else:
                _step(model, recipe, architecture.vocab_size, tracer)
    return _Run(
        log=log,
        marks=tracer.marks,
        positions={
            hole: kept.index(int(path.split(".")[0])) for hole, path in holes.items()
        },
        numbers=_numbers(holes),
        paths=_paths(holes, kept),
        stack=stack,
        kept=kept,
        calls=calls,
        input_dtypes=tracer.input_dtypes,
        plain=plain,
        window=_window(architecture),
    )


def _recipe(regime: Regime, length: int) -> Recipe:
    return Recipe(
        method="full",
        dtype=regime.dtype,
        autocast=regime.autocast,
        attention="eager" if regime.attention == "eager" else "auto",
        padded=regime.padded,
        checkpointing="full" if regime.checkpointed else "none",
        keep_outputs="none",
        batch_size=BATCH,
        sequence_length=length,
    )


def _short_model(
    architecture: Architecture,
    recipe: Recipe,
    regime: Regime,
    stack: str,
    kept: list[int],
) -> nn.Module:
    layers = KeptLayers(stack=stack, numbers=tuple(kept), left_out={})
    model = build_few(
        lambda: training_model.build(architecture, recipe), architecture, layers
    )
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if getattr(config, "sliding_window", None):
        config.sliding_window = _window_of(regime)
    return model


def _window_of(regime: Regime) -> int:
    if regime.answers == STATIC_WINDOW:
        return ROOM
    return WINDOW if regime.windowed else NO_WINDOW


def _is_static(regime: Regime) -> bool:
    return regime.answers.startswith(STATIC)


def _adapt_experts(
    model: nn.Module, architecture: Architecture, regime: Regime
) -> None:
    """Installs LoRA on experts; that on linear layers goes when these become holes."""
    targets, _, adapter_dtype = regime.experts.partition(":")
    recipe = Recipe(
        rank=RANK,
        targets=targets,
        dtype=regime.dtype,
        autocast=regime.autocast,
        adapter_dtype=adapter_dtype,
    )
    targeted = training_model.target_modules(architecture, recipe)
    training_model.install(model, recipe, targeted)


def _linears(stack: nn.Module) -> list[tuple[str, Any]]:
    """Linear layers by their paths in the stack; what adapters are made of is none."""
    found: list[tuple[str, Any]] = []
    for path, module in stack.named_modules():
        if any(path.startswith(f"{one}.") for one, _ in found) or ".lora_" in path:
            continue
        linear = getattr(module, "base_layer", module)
        if _is_hole(linear):
            found.append((path, linear))
    return found


def _dig(stack: nn.Module, tracer: TapeTracer, regime: Regime) -> dict[int, str]:
    """Puts holes in the place of linear layers; their paths in the stack by number."""
    outputs = dict(regime.outputs)
    paths: dict[int, str] = {}
    for path, linear in _linears(stack):
        shape = linear.weight.shape
        out_features = shape[1] if isinstance(linear, Conv1D) else shape[0]
        number = len(paths)
        casts = regime.casts(is_plain=_is_plain(linear))
        named = outputs.get(path.partition(".")[2], regime.autocast if casts else "")
        dtype = getattr(torch, named) if named else None
        stack.set_submodule(path, Hole(tracer, number, out_features, dtype))
        paths[number] = path
    return paths


def _plain(stack: nn.Module) -> dict[int, bool]:
    return {
        number: _is_plain(linear) for number, (_, linear) in enumerate(_linears(stack))
    }


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) in (nn.Linear, Conv1D)


def _window(architecture: Architecture) -> int | None:
    return getattr(_whole_config(architecture), "sliding_window", None) or None


def _whole_config(architecture: Architecture) -> Any:
    """The text model's config, with all of its layers."""
    source = ModelSource(
        name=architecture.name, origin="catalog", config=dict(architecture.config)
    )
    return build_config(source).get_text_config()


def _is_hole(module: nn.Module) -> bool:
    """Whether a module is a linear layer that gives one tensor: a router may not."""
    is_router = "router" in type(module).__name__.lower()
    return isinstance(module, nn.Linear | Conv1D) and not is_router


def _numbers(holes: dict[int, str]) -> dict[int, int]:
    counts: dict[str, int] = {}
    numbers = {}
    for hole, path in holes.items():
        layer = path.split(".")[0]
        numbers[hole] = counts.get(layer, 0)
        counts[layer] = numbers[hole] + 1
    return numbers


def _paths(holes: dict[int, str], kept: list[int]) -> dict[int, list[str]]:
    paths: dict[int, list[str]] = {}
    for path in holes.values():
        layer, _, rest = path.partition(".")
        paths.setdefault(kept.index(int(layer)), []).append(rest)
    return paths


def _require_gradient(model: nn.Module) -> None:
    """Lets the first layer's input need a gradient, as every other layer's does."""

    def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output if output.requires_grad else output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator]


def _step(model: Any, recipe: Recipe, vocab_size: int, tracer: TapeTracer) -> None:
    """The body's step; the head and the loss are one more hole."""
    device = torch.device("meta")
    tracer.log.begin("1.forward")
    batch = make_batch(recipe, vocab_size, device)
    labels = batch.pop("labels")
    with autocast(recipe, device):
        hidden = body_of(model)(**batch, use_cache=False).last_hidden_state
        loss = Hole(tracer, LOSS, 1, torch.float32)(hidden)
    del hidden
    tracer.log.begin("1.backward")
    loss.sum().backward()
    del loss, batch, labels
    tracer.stop()


def _cache(architecture: Architecture, regime: Regime) -> StaticCache | None:
    if not _is_static(regime):
        return None
    config = _whole_config(architecture)
    if getattr(config, "sliding_window", None):
        config.sliding_window = _window_of(regime)
    return StaticCache(config=config, max_cache_len=ROOM)


def _read(
    model: Any,
    recipe: Recipe,
    cache: StaticCache | None,
    architecture: Architecture,
    tracer: TapeTracer,
) -> None:
    """The body's forward over prompts, without autograd, as `generate` calls it.

    What a static cache holds outlives the log; keys and values that grow are left out.
    """
    tracer.log.begin("1.forward")
    body = body_of(model)
    batch = make_batch(recipe, architecture.vocab_size, torch.device("meta"))
    del batch["labels"]
    batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if "position_ids" in inspect.signature(body.forward).parameters:
        batch["position_ids"] = torch.empty_like(batch["input_ids"])
    kept = {} if cache is None else {"past_key_values": cache}
    with torch.no_grad():
        hidden = body(**batch, **kept, use_cache=bool(kept)).last_hidden_state
        Hole(tracer, LOSS, 1, torch.float32)(hidden)
    del hidden, batch
    tracer.log.begin("1.backward")
    tracer.stop()


def body_of(model: Any) -> Any:
    """What gives hidden states; a base model may be one with a head (Llama 4)."""
    base = model.base_model
    return base.model if hasattr(base, "lm_head") else base


@contextmanager
def _kernels(regime: Regime, calls: list[kernels.Shapes]) -> Iterator[None]:
    """Attention by the regime's kernels, or the next that takes such heads."""

    def choose(asked: str, shapes: kernels.Shapes, gpu: Gpu) -> str:
        wanted = regime.masked_attention if shapes.masked else regime.attention
        calls.append(shapes)
        return kernels.first((wanted, *kernels.KERNELS), shapes, gpu)

    with mock.patch.object(kernels, "choose", choose):
        yield


def _heads(calls: list[kernels.Shapes]) -> tuple[Heads, ...]:
    """The heads of attention calls, those without a mask first, each once."""
    heads = [
        Heads(
            query=shapes.query[1],
            key=shapes.key[1],
            query_dim=shapes.query[-1],
            value_dim=shapes.value[-1],
            grouped=shapes.grouped,
            dense_rows=shapes.dense_rows,
        )
        for shapes in sorted(calls, key=lambda shapes: shapes.masked)
    ]
    return tuple(dict.fromkeys(heads))


_EMBEDDING = "embedding_dense_backward"


class _Parser:
    """Takes a traced step apart into the spans of its layers and what is around."""

    def __init__(self, run: _Run, num_layers: int) -> None:
        self._run = run
        self._num_layers = num_layers
        self._freed = {
            block for block, size in run.log.events if size == FREE and block >= 0
        }
        self._size = run.sizes
        forward, backward = self._moments()
        self._before, self._forward, self._tail = self._split(
            forward, range(num_layers)
        )
        self._loss, self._backward, self._after = self._split(
            backward, range(num_layers - 1, -1, -1)
        )

    def parse(self, layers: list[int]) -> ModelTape:
        """The tape, its blocks those of the layers at those positions."""
        return ModelTape(
            attention=_heads(self._run.calls),
            window=self._run.window,
            before=self._stretch(self._before),
            hidden_dtype=self._run.input_dtypes[LOSS],
            blocks=tuple(self._block(layer) for layer in layers),
            tail=self._tape([*self._tail, *self._loss]),
            after=self._stretch(self._after),
            carried=self._carried(next((n for n in layers if n), 0)),
        )

    def _carried(self, layer: int) -> Polynomial:
        """What a layer's forward releases of the one before it.

        The first one's, which releases what comes before the layers, is taken off.
        """
        spans = {-1: self._before, **self._forward}
        carried: Polynomial = {}
        for place, sign in ((layer, 1), (0, -1)):
            for block in _made_and_released(spans[place - 1], spans[place]):
                carried = add(carried, self.size(block), sign)
        return carried

    def track(self, layers: list[int]) -> ModelTrack:
        """The track, its blocks those of the layers at those positions."""
        last = self._num_layers
        log = self._run.log
        tracks = ModelTracks(
            self._size,
            {-1: self._before, **self._forward, last: self._tail},
            {last: self._loss, **self._backward, -1: self._after},
            self._run.numbers,
            (
                block
                for block, operator in enumerate(log.operators)
                if _EMBEDDING in operator
                or (log.categories[block] == "workspace" and block not in self._freed)
            ),
        )
        blocks = tuple(tracks.block(layer) for layer in layers)
        return tracks.model(blocks, last)

    def _moments(self) -> tuple[list[Event], list[Event]]:
        """The events of forward and backward, with the marks of holes in between."""
        moments: list[list[Event]] = []
        marks = iter([*self._run.marks, (len(self._run.log.events) + 1, None)])
        at, mark = next(marks)
        for index, event in enumerate(self._run.log.events):
            while at <= index and mark is not None:
                moments[-1].append(mark)
                at, mark = next(marks)
            if event[0] == MARK:
                moments.append([])
            else:
                moments[-1].append(event)
        forward, backward = moments
        return forward, backward

    def _split(
        self, events: list[Event], order: range
    ) -> tuple[list[Event], dict[int, list[Event]], list[Event]]:
        """What comes before the layers, each layer's events, and what comes after."""
        positions = [self._position(event) for event in events]
        last = max(
            (index for index, position in enumerate(positions) if position is not None),
            default=-1,
        )
        parts: list[list[Event]] = [[] for _ in range(len(order) + 2)]
        part = 0
        for index, (event, position) in enumerate(zip(events, positions, strict=True)):
            if position is not None and position == order[min(part, len(order) - 1)]:
                part = min(part + 1, len(order))
            elif index > last and self._is_allocation(event):
                part = len(order) + 1
            parts[part].append(event)
        layers = dict(zip(order, parts[1:-1], strict=True))
        return parts[0], layers, parts[-1]

    def _position(self, event: Event) -> int | None:
        """The position of the layer that makes a block; None outside of layers."""
        if isinstance(event, HoleMark):
            return self._run.positions.get(event.hole)
        block, size = event
        if block < 0 or size == FREE:
            return None
        module = self._run.log.modules[block]
        head = f"{self._run.stack}."
        if not module.startswith(head):
            return None
        return self._run.kept.index(int(module.removeprefix(head).split(".")[0]))

    def _is_allocation(self, event: Event) -> bool:
        return isinstance(event, HoleMark) or event[1] != FREE

    def _block(self, layer: int) -> BlockTape:
        run = self._run
        holes = [hole for hole, place in run.positions.items() if place == layer]
        return BlockTape(
            input_dtypes=tuple(run.input_dtypes[hole] for hole in holes),
            plain=tuple(run.plain[hole] for hole in holes),
            holes=tuple(self._run.paths[layer]),
            forward=self._tape(self._forward[layer]),
            backward=self._tape(self._backward[layer]),
            kept=self._kept(layer),
        )

    def _kept(self, layer: int) -> tuple[Polynomial, ...]:
        """Blocks that are made in the layer's forward and released in backward."""
        released = {
            event[0]
            for events in self._backward.values()
            for event in events
            if not isinstance(event, HoleMark) and event[1] == FREE
        }
        return tuple(
            self._size[event[0]]
            for event in self._forward[layer]
            if not isinstance(event, HoleMark)
            and event[1] != FREE
            and event[0] in released
        )

    def _tape(self, events: list[Event]) -> Tape:
        return tuple(_Writer(self, events).write())

    def _stretch(self, events: list[Event]) -> Stretch:
        tape = _Writer(self, events).write()
        assert len(tape) == 1
        stretch = tape[0]
        assert isinstance(stretch, Stretch)
        return stretch

    def is_left_out(self, block: int) -> bool:
        """Whether a block outlives the step, as gradients and workspaces do.

        The kernel of an embedding's gradient is left out too: its scratch grows with
        the smaller of tokens and vocabulary.
        """
        operator = self._run.log.operators[block]
        return block not in self._freed or _EMBEDDING in operator

    def size(self, block: int) -> Polynomial:
        return self._size[block]

    def number(self, hole: int) -> int:
        return self._run.numbers.get(hole, LOSS)


def _made_and_released(making: list[Event], releasing: list[Event]) -> list[int]:
    """Blocks that one span makes and another one releases."""
    made = {
        event[0]
        for event in making
        if not isinstance(event, HoleMark) and event[1] != FREE
    }
    return [
        event[0]
        for event in releasing
        if not isinstance(event, HoleMark) and event[1] == FREE and event[0] in made
    ]


class _Writer:
    """Writes events as stretches and marks."""

    def __init__(self, parser: _Parser, events: list[Event]) -> None:
        self._parser = parser
        self._events = events
        self._tape: list[Stretch | Mark] = []
        self._inputs = self._inputs_of_holes()
        self._let_go = let_go_of(events)
        self._let_go_blocks = set(self._let_go.values())
        self._inside = False
        self._net: Polynomial = {}
        self._candidates: list[Polynomial] = []

    def write(self) -> list[Stretch | Mark]:
        for event in self._events:
            if isinstance(event, HoleMark):
                self._mark(event)
            elif self._parser.is_left_out(event[0]):
                continue
            elif event[1] == FREE:
                self._free(event[0])
            elif not self._inside:
                self._allocate(event[0])
        self._end_stretch(force=not self._tape)
        return self._tape

    def _inputs_of_holes(self) -> dict[int, tuple[int, ...]]:
        """By block: the numbers of the holes that it goes into."""
        inputs: dict[int, tuple[int, ...]] = {}
        for event in self._events:
            if isinstance(event, HoleMark) and event.kind == "F":
                number = self._parser.number(event.hole)
                inputs[event.block] = (*inputs.get(event.block, ()), number)
        return inputs

    def _mark(self, mark: HoleMark) -> None:
        if mark.kind in ("F", "B"):
            self._end_stretch()
            number = self._parser.number(mark.hole)
            owned = mark.kind == "B" and mark.hole in self._let_go
            size = self._parser.size(mark.block) if owned else {}
            self._tape.append(Mark(kind=mark.kind, holes=(number,), size=size))
        self._inside = mark.kind in ("F", "B")

    def _allocate(self, block: int) -> None:
        self._net = add(self._net, self._parser.size(block))
        self._candidates.append(self._net)

    def _free(self, block: int) -> None:
        if block in self._let_go_blocks:
            return
        if block in self._inputs:
            self._end_stretch()
            size = self._parser.size(block)
            self._tape.append(Mark(kind="drop", holes=self._inputs[block], size=size))
            return
        self._net = add(self._net, self._parser.size(block), -1)

    def _end_stretch(self, *, force: bool = False) -> None:
        if self._net or self._candidates or force:
            peaks = tuple(largest(self._candidates))
            self._tape.append(Stretch(net=self._net, peaks=peaks))
        self._net = {}
        self._candidates = []
