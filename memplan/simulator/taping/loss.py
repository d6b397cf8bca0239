"""The tape of head and loss: the model's own forward over given hidden states."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from memplan.architecture import Architecture
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator import no_initialization, no_warnings
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.reroute import Reroute
from memplan.simulator.taping.holes import TapeTracer
from memplan.simulator.taping.model import CARD, body_of
from memplan.simulator.taping.tracks import Span
from memplan.tape import LossRegime, LossTape
from memplan.track import INPUT, LossTrack
from memplan.training import model as training_model
from memplan.training.few_layers import KeptLayers, build_few
from memplan.training.loss import read_loss, run_forward
from memplan.training.step import autocast

TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens between which losses are nearly straight: they work on tiles of 256 or 4096,
on parts of a sequence, or on all tokens; a gradient's own size may be the larger."""


def trace_loss(architecture: Architecture, regime: LossRegime) -> LossTape:
    """The tape of a model's head and loss."""
    readings = _readings(architecture, regime)
    return LossTape(
        tokens=TOKENS,
        kept=tuple(reading.kept for reading in readings),
        left=tuple(reading.left for reading in readings),
        forward_peak=tuple(reading.forward_peak[0] for reading in readings),
        backward_peak=tuple(reading.backward_peak[0] for reading in readings),
        head_peak=tuple(reading.head_peak for reading in readings),
        head_in_forward=readings[0].head_in_forward,
        logits=tuple(reading.logits for reading in readings),
        holds_input=readings[0].holds_input,
    )


def track_loss(architecture: Architecture, regime: LossRegime) -> LossTrack:
    """The track of a model's head and loss."""
    tracks = [reading.track() for reading in _readings(architecture, regime)]
    sizes, lasting, input_gradient, forward, backward = zip(*tracks, strict=True)
    return LossTrack(
        tokens=TOKENS,
        sizes=sizes,
        lasting=lasting,
        input_gradient=input_gradient,
        forward=forward,
        backward=backward,
    )


def _readings(architecture: Architecture, regime: LossRegime) -> list[_Reading]:
    """What a run at each number of tokens says."""
    key = (id(architecture), regime.key)
    if key not in _LAST:
        model = _build(architecture, regime)
        _LAST.clear()
        _LAST[key] = (
            architecture,
            [_Reading(*_run(architecture, model, regime, n)) for n in TOKENS],
        )
    return _LAST[key][1]


_LAST: dict[tuple[int, str], tuple[Architecture, list[_Reading]]] = {}
"""The last readings: tape and track are made of the same."""


def _build(architecture: Architecture, regime: LossRegime) -> nn.Module:
    recipe = _recipe(regime, TOKENS[0])
    first = KeptLayers(stack=architecture.main_stack, numbers=(0,), left_out={})
    model = build_few(
        lambda: training_model.build(architecture, recipe), architecture, first
    )
    return model.requires_grad_(regime.trained).train()


def _recipe(regime: LossRegime, tokens: int) -> Recipe:
    return Recipe(
        trainer="transformers" if regime.float32_outputs else "plain",
        method="full",
        dtype=regime.dtype,
        autocast=regime.autocast,
        loss=regime.loss,
        keep_outputs="backward" if regime.keeps_output else "none",
        batch_size=1,
        sequence_length=tokens,
    )


def _run(
    architecture: Architecture, model: Any, regime: LossRegime, tokens: int
) -> tuple[EventLog, TapeTracer]:
    recipe = _recipe(regime, tokens)
    log = EventLog()
    tracer = TapeTracer(find_gpu(CARD), log, padded=False)
    tracer.vocab_size = architecture.vocab_size
    device = torch.device("meta")
    shape = (1, tokens, model.get_output_embeddings().weight.shape[-1])
    dtype = getattr(torch, regime.hidden_dtype)

    def body(self: Any, *args: Any, **kwargs: Any) -> _Body:
        hidden = _Hidden.apply(tracer.token, shape, dtype, tracer)  # type: ignore[no-untyped-call]
        return _Body(hidden)

    parts = (body_of(model), model.get_decoder())
    for part in {id(p): p for p in parts if p is not model}.values():
        # Most heads call the base model, OPT's calls the decoder within it.
        part.forward = types.MethodType(body, part)
    with (
        no_warnings(),
        no_initialization(),
        Reroute(tracer, recipe).installed(),
        tracer,
    ):
        for tensor in (*model.parameters(), *model.buffers()):
            tracer.ignore(tensor)
        batch = {
            name: torch.empty(shape[:2], dtype=torch.int64, device=device)
            for name in ("input_ids", "labels")
        }
        log.begin("1.forward")
        with autocast(recipe, device):
            outputs = run_forward(model, batch, recipe)
        outputs, loss = read_loss(outputs, recipe)
        if not regime.keeps_output:
            outputs = None
        tracer.mark("f", -1, None)
        log.begin("1.backward")
        loss.backward()
        del loss, batch
        tracer.mark("end", -1, None)
        del outputs
        tracer.stop()
    for parameter in model.parameters():
        parameter.grad = None
    return log, tracer


class _Body:
    """What a body returns, of which the head reads the hidden states alone."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Any:
        return (self.last_hidden_state,)[index]


class _Hidden(torch.autograd.Function):
    """Makes the hidden states, and takes their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        token: torch.Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        tracer: TapeTracer,
    ) -> torch.Tensor:
        ctx.tracer = tracer
        hidden = torch.empty(shape, dtype=dtype, device="meta")
        tracer.mark("F", -1, hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.tracer.mark("b", -1, grad)
        return torch.empty((), device="meta"), None, None, None


class _Reading:
    """What one run says."""

    def __init__(self, log: EventLog, tracer: TapeTracer) -> None:
        self._log = log
        self._tracer = tracer
        places = {mark.kind: (at, mark.block) for at, mark in tracer.marks}
        begin, self._hidden = places["F"]
        forward, _ = places["f"]
        behind, self._gradient = places["b"]
        end, _ = places["end"]
        self._places = (begin, forward, end)
        freed = {block for block, size in log.events if size == FREE}
        self._passing = freed
        events = log.events
        self.holds_input = (self._hidden, FREE) not in events[begin:forward]
        live, self.forward_peak = self._walk(events[begin:forward], 0, 0)
        self.kept, logits = live
        back = [event for event in events[forward:behind] if event[0] >= 0]
        _, self.backward_peak = self._walk(back, self.kept, logits)
        whole = [event for event in events[forward:end] if event[0] >= 0]
        self.head_in_forward = any(
            size != FREE and self._is_gradient(block)
            for block, size in events[begin:forward]
            if block >= 0
        )
        self.head_peak = (
            self.backward_peak[0]
            if self.head_in_forward
            else self._head_peak(whole, logits)
        )
        (self.left, _), _ = self._walk(whole, self.kept, logits)
        self.logits = max(self.forward_peak, self.backward_peak)[1]

    def track(self) -> tuple[Any, ...]:
        """Sizes, lasting blocks, the gradient's number, and events both ways.

        The gradient is the body's to release.
        """
        begin, forward, end = self._places
        span = Span(self._tracer, {self._hidden: INPUT})
        ahead = span.write(begin, forward)
        back = span.write(forward, end)
        gradient = span.number(self._gradient)
        back = tuple(event for event in back if event != -1 - gradient)
        log = self._log
        sizes = tuple(
            0 if span.is_workspace(block) else log.sizes[block] for block in span.blocks
        )
        return sizes, span.lasting, gradient, ahead, back

    def _head_peak(self, back: list[tuple[int, int]], logits: int) -> int:
        """The peak from the first block on that outlives the step."""
        made = [at for at, (block, _) in enumerate(back) if self._is_gradient(block)]
        if not made:
            return 0
        before = back[: made[0]]
        live, _ = self._walk(before, self.kept, logits)
        _, (peak, _) = self._walk(back[made[0] :], *live)
        return peak

    def _is_gradient(self, block: int) -> bool:
        """Whether a block outlives the step, and is no library's workspace."""
        category = self._log.categories[block]
        return block not in self._passing and category != "workspace"

    def _walk(
        self, events: list[tuple[int, int]], live: int, logits: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Bytes, and of these logits: at the end, and where most are live."""
        peak = (live, logits)
        for block, size in events:
            if block == self._hidden or block not in self._passing:
                continue
            sign = -1 if size == FREE else 1
            live += sign * self._log.sizes[block]
            if self._log.categories[block] == "logits":
                logits += sign * self._log.sizes[block]
            peak = max(peak, (live, logits))
        return (live, logits), peak
