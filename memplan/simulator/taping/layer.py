"""A linear layer's tape: its step as a method and a quantisation make it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils.checkpoint import _StopRecomputationError, checkpoint
from transformers import PreTrainedConfig

from memplan import quantizations
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator import no_initialization, no_warnings
from memplan.simulator.events import FREE, MARK, EventLog
from memplan.simulator.reroute import Reroute
from memplan.simulator.taping.holes import TapeTracer
from memplan.simulator.taping.model import CARD
from memplan.simulator.taping.polynomials import (
    BATCH,
    LENGTHS,
    Dimensions,
    add,
    largest,
)
from memplan.simulator.taping.tracks import Span
from memplan.tape import LayerRegime, LayerTape, Mark, Polynomial, Stretch
from memplan.track import INPUT, OUTPUT_GRADIENT, LayerTrack
from memplan.training import model as training_model
from memplan.training.step import autocast

STEP = 128
"""What inputs and outputs are multiples of: the weights that share a scale, at most."""

_IN, _OUT, RANK = 61, 67, 59
"""Primes that tell inputs, outputs and rank; the rank divides both sides, as methods
that average over groups ask."""

IN_FEATURES = STEP * RANK * _IN
OUT_FEATURES = STEP * RANK * _OUT

DIMENSIONS = Dimensions(
    {
        "N": (BATCH * LENGTHS[0], BATCH),
        "i": (IN_FEATURES, _IN),
        "o": (OUT_FEATURES, _OUT),
        "r": (RANK, RANK),
    },
    shared=RANK,
)


LARGE_BYTES = 2**20
"""Bytes from which on a size that shows no dimension is as long as the weight: as many
blocks of a quantised layer's scales as there are, rounded up."""


def size_of(num_bytes: int) -> Polynomial:
    """A block's size in the layer's dimensions."""
    size = DIMENSIONS.monomial(num_bytes)
    if num_bytes < LARGE_BYTES or any(size):
        return size
    return {"io": num_bytes / (IN_FEATURES * OUT_FEATURES)}


class Single(nn.Module):
    """A model of one linear layer, as PEFT can adapt it."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.config = PreTrainedConfig(hidden_size=OUT_FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """What PEFT asks a causal language model for."""


def trace_layer(regime: LayerRegime) -> LayerTape:
    """The tape of a linear layer in a regime.

    Raises InputError where it has as many tensors as the rank: no tape says so.
    """
    if regime.method == "peft":
        _check_tuner(regime)
    return _reader(regime).read()


def track_layer(regime: LayerRegime) -> LayerTrack:
    """The track of a linear layer in a regime."""
    return _reader(regime).track()


@functools.lru_cache(maxsize=1)
def _reader(regime: LayerRegime) -> _Reader:
    """The runs of which tape and track are read."""
    return _Reader(_run(regime, keeps=True), _run(regime, keeps=False))


def _check_tuner(regime: LayerRegime) -> None:
    """Raises InputError for a tuner of PEFT that no tape can describe."""
    problem = "the rank is how many tensors a layer makes"
    try:
        if _events(regime, 2) == _events(regime, 4):
            return
    except RuntimeError as error:
        problem = str(error).partition("\n")[0]
    raise InputError(
        "method_options",
        json.loads(regime.options),
        f"cannot be estimated: {problem}",
        "use `memplan simulate`",
    )


def _events(regime: LayerRegime, rank: int) -> int:
    """How many allocations and frees a step of the layer has at a rank."""
    return len(_run(regime, keeps=True, rank=rank)[0].events)


def recipe_of(regime: LayerRegime, rank: int = RANK) -> Recipe:
    """The recipe under which a layer runs in a regime."""
    method = "full" if regime.method == "frozen" else regime.method
    return Recipe(
        trainer="trl" if regime.by_trl else "plain",
        method=method,
        quantization=regime.quantization,
        dtype=regime.dtype,
        autocast=regime.autocast,
        compute_dtype=regime.compute_dtype,
        adapter_dtype=regime.adapter_dtype,
        input_casts=regime.input_casts,
        dropout=0.5 if regime.dropout else 0.0,
        targets=("linear",),
        method_options=json.loads(regime.options) if regime.options else {},
        rank=rank,
        batch_size=BATCH,
        sequence_length=LENGTHS[0],
    )


def build_layer(
    regime: LayerRegime,
    rank: int = RANK,
    loaded: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The model of one layer, quantised and adapted.

    `loaded` is told of it before it is adapted.
    """
    recipe = recipe_of(regime, rank)
    dtype = getattr(torch, regime.dtype)
    linear: nn.Module = nn.Linear(
        IN_FEATURES, OUT_FEATURES, bias=regime.bias, dtype=dtype, device="meta"
    )
    scheme = quantizations.find(regime.quantization)
    if scheme.loading_flag is not None:
        linear = scheme.quantized(linear, recipe)
        linear.source_cls = nn.Linear  # type: ignore[assignment]
    model = Single(linear)
    if scheme.loading_flag is not None:
        setattr(model, scheme.loading_flag, True)
        model.is_quantized = True  # type: ignore[assignment]
    model.requires_grad_(False)
    loaded(model)
    if regime.method == "frozen":
        return model.train()
    if regime.method == "full":
        return model.requires_grad_(True).train()
    # PEFT begins adapters on the host. What other tuners fill there takes minutes; what
    # is left there for HQQ's layers until all are made may be more than there is.
    on_card = regime.method == "peft" or scheme.loading_flag == "hqq_quantized"
    with torch.device("meta") if on_card else nullcontext():
        return training_model.install(model, recipe, ("linear",)).train()


def _run(
    regime: LayerRegime, *, keeps: bool, rank: int = RANK
) -> tuple[EventLog, TapeTracer]:
    recipe = recipe_of(regime, rank)
    log = EventLog()
    tracer = TapeTracer(find_gpu(CARD), log, padded=False)
    device = torch.device("meta")
    with (
        no_warnings(),
        no_initialization(),
        Reroute(tracer, recipe).installed(),
        tracer,
    ):

        def ignore(model: nn.Module) -> None:
            for tensor in (*model.parameters(), *model.buffers()):
                tracer.ignore(tensor)

        def loaded(model: nn.Module) -> None:
            ignore(model)
            tracer.mark("loaded", 0, None)

        model = build_layer(regime, rank, loaded)
        tracer.mark("adapted", 0, None)
        ignore(model)
        log.begin("1.forward")
        dtype = getattr(torch, regime.input_dtype)
        single = next(m for m in model.modules() if isinstance(m, Single))
        with autocast(recipe, device):
            if keeps:
                _step(single, tracer, dtype)
            else:
                _pass(single, tracer, dtype)
        tracer.stop()
    return log, tracer


def _step(model: nn.Module, tracer: TapeTracer, dtype: torch.dtype) -> None:
    """Forward and backward, between marks."""
    x = _Source.apply(tracer.token, dtype, tracer)  # type: ignore[no-untyped-call]
    tracer.mark("F", 0, x)
    y = model(x)
    tracer.mark("f", 0, y)
    tracer.output_dtype = str(y.dtype).removeprefix("torch.")
    loss = _Sink.apply(y, tracer)  # type: ignore[no-untyped-call]
    del x, y
    tracer.mark("dropped", 0, None)
    with torch.autocast("cuda", enabled=False):
        loss.backward()
    del loss


def _pass(model: nn.Module, tracer: TapeTracer, dtype: torch.dtype) -> None:
    """A checkpoint's first forward, between two marks; its input is made within.

    Backward begins between the first mark of its kind and the second source's, after
    which the forward stops at a mark of its own: all that was asked for is there.
    """

    class StopError(_StopRecomputationError):
        def __init__(self) -> None:
            tracer.mark("stop", 0, None)

    def run(token: torch.Tensor) -> torch.Tensor:
        x = _Source.apply(token, dtype, tracer)  # type: ignore[no-untyped-call]
        tracer.mark("F", 0, x)
        y: torch.Tensor = model(x)
        tracer.mark("f", 0, y)
        return y

    y = checkpoint(run, tracer.token, use_reentrant=False)
    loss = _Sink.apply(y, tracer)  # type: ignore[no-untyped-call]
    tracer.mark("dropped", 0, y)
    del y
    with (
        torch.autocast("cuda", enabled=False),
        mock.patch.object(torch.utils.checkpoint, "_StopRecomputationError", StopError),
    ):
        loss.backward()
    del loss


class _Source(torch.autograd.Function):
    """Makes the input, and takes its gradient."""

    @staticmethod
    def forward(
        ctx: Any, token: torch.Tensor, dtype: torch.dtype, tracer: TapeTracer
    ) -> torch.Tensor:
        ctx.tracer = tracer
        tracer.mark("source", 0, None)
        shape = (BATCH, LENGTHS[0], IN_FEATURES)
        return torch.empty(shape, dtype=dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.tracer.mark("b", 0, grad)
        return torch.empty((), device="meta"), None, None


class _Sink(torch.autograd.Function):
    """Takes the output, and makes its gradient."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, tracer: TapeTracer) -> torch.Tensor:
        ctx.shape, ctx.dtype, ctx.tracer = y.shape, y.dtype, tracer
        return y.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        grad_y = torch.empty(ctx.shape, dtype=ctx.dtype, device="meta")
        ctx.tracer.mark("B", 0, grad_y)
        return grad_y, None


def _sizes(log: EventLog, span: Span) -> tuple[Polynomial, ...]:
    """Sizes of a span's blocks; cuBLAS' workspaces, counted otherwise, have none."""
    return tuple(
        {} if span.is_workspace(block) else size_of(log.sizes[block])
        for block in span.blocks
    )


class _Reader:
    """Reads the stretches of a layer off its two runs."""

    def __init__(
        self, kept: tuple[EventLog, TapeTracer], passing: tuple[EventLog, TapeTracer]
    ) -> None:
        self._log, self._tracer = kept
        self._passing = passing
        self._at = {mark.kind: (at, mark.block) for at, mark in self._tracer.marks}

    def read(self) -> LayerTape:
        begin, x = self._at["F"]
        end, output = self._at["f"]
        dropped, _ = self._at["dropped"]
        back, grad_y = self._at["B"]
        behind, _ = self._at["b"]
        events = self._log.events
        released = {block for block, size in events[back:] if size == FREE}
        kept = [
            block
            for block, size in events[begin:end]
            if size >= 0 and block in released and block >= 0
        ]
        holds = all((b, s) != (x, FREE) for b, s in events[begin:dropped])
        passing = self._read_passing()
        left = add(passing.net, size_of(self._log.sizes[output]), -1)
        ahead = stretch_of(self._log, back, back + self._num_ahead()).net
        forward = stretch_of(self._log, begin, end)
        return LayerTape(
            forward=forward,
            passing=passing,
            cached={word: each for word, each in left.items() if "N" not in word},
            sticks=self._sticks(),
            stuck={word: each for word, each in left.items() if "N" in word},
            output_dtype=self._tracer.output_dtype,
            backward=tuple(self._backward(back, behind, {x: "x", grad_y: "y"})),
            holds_input=holds,
            kept=tuple(size_of(self._log.sizes[block]) for block in kept),
            ahead=ahead,
            again=self._read_again(forward),
        )

    def track(self) -> LayerTrack:
        """Every block, in order."""
        begin, x = self._at["F"]
        end, output = self._at["f"]
        back, grad_y = self._at["B"]
        behind, grad_x = self._at["b"]
        span = Span(self._tracer, {x: INPUT, grad_y: OUTPUT_GRADIENT})
        forward = span.write(begin, end)
        backward = span.write(back, behind)
        rest = span.write(behind, len(self._log.events), (x, grad_y, grad_x))
        adapting = Span(self._tracer, {})
        adapt = adapting.write(self._at["loaded"][0], self._at["adapted"][0])
        log, tracer = self._passing
        first, last = self._first_mark("F"), self._first_mark("f")
        passing = Span(tracer, {first[1]: INPUT})
        passed = passing.write(first[0], last[0])
        ahead = span.write(back, back + self._num_ahead())
        return LayerTrack(
            ahead=len(ahead),
            lasting=tuple(n for n in span.lasting if span.blocks[n] not in (output, x)),
            output=span.number(output),
            input_gradient=span.number(grad_x),
            forward=forward,
            backward=(*backward, *rest),
            passing_output=passing.number(last[1]),
            passing=passed,
            sizes=_sizes(self._log, span),
            passing_sizes=_sizes(log, passing),
            adapt=adapt,
            adapt_sizes=_sizes(self._log, adapting),
        )

    def _backward(
        self, begin: int, end: int, given: dict[int, str]
    ) -> Iterator[Stretch | Mark]:
        """The backward, with marks where it releases what it is given."""
        at = begin
        for place in range(begin, end):
            block, size = self._log.events[place]
            if size == FREE and block in given:
                yield stretch_of(self._log, at, place)
                yield Mark(kind=given[block])
                at = place + 1
        yield stretch_of(self._log, at, end)

    def _sticks(self) -> bool:
        """Whether the input outlives a checkpoint's first forward."""
        log, _ = self._passing
        begin, x = self._first_mark("F")
        end, _ = self._first_mark("dropped")
        return (x, FREE) not in log.events[begin:end]

    def _read_passing(self) -> Stretch:
        log, _ = self._passing
        (begin, _), (end, _) = self._first_mark("F"), self._first_mark("f")
        return stretch_of(log, begin, end)

    def _read_again(self, forward: Stretch) -> Stretch:
        """The forward as a checkpoint runs it again, with the peaks up to its stop."""
        log, tracer = self._passing
        stops = [at for at, mark in tracer.marks if mark.kind == "stop"]
        begins = [at for at, mark in tracer.marks if mark.kind == "F"][1:]
        if not stops or not begins:
            return forward
        peaks = stretch_of(log, begins[0], stops[0]).peaks
        return Stretch(net=forward.net, peaks=peaks)

    def _first_mark(self, kind: str) -> tuple[int, int]:
        """Where a checkpoint's run first has a mark of that kind, and its block."""
        _, tracer = self._passing
        return next((at, mark.block) for at, mark in tracer.marks if mark.kind == kind)

    def _num_ahead(self) -> int:
        """Events of backward before the checkpoint runs the layer again.

        None where nothing of the layer is asked for, and a later one asks first.
        """
        _, tracer = self._passing
        back, _ = self._first_mark("B")
        again = [at for at, mark in tracer.marks if mark.kind == "source"][1:]
        return again[0] - back if again else 0


def stretch_of(log: EventLog, begin: int, end: int) -> Stretch:
    """The stretch, without what outlives the step: gradients and workspaces."""
    freed = {block for block, size in log.events if size == FREE}
    net: Polynomial = {}
    candidates: list[Polynomial] = []
    for block, size in log.events[begin:end]:
        if block == MARK:
            continue
        bytes_ = size_of(log.sizes[block])
        if size == FREE:
            net = add(net, bytes_, -1)
        elif block in freed or not _outlives(log, block):
            net = add(net, bytes_)
            candidates.append(net)
    return Stretch(net=net, peaks=tuple(largest(candidates)))


def _outlives(log: EventLog, block: int) -> bool:
    return all("N" not in word for word in size_of(log.sizes[block]))
