"""Tapes of inference: linear layers without autograd, and what a cache keeps."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from memplan.architecture import Architecture
from memplan.errors import InputError
from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator import no_initialization, no_warnings
from memplan.simulator.events import EventLog
from memplan.simulator.life import GROWING_LAYERS, held_tensors
from memplan.simulator.operators import quantized
from memplan.simulator.reroute import Reroute
from memplan.simulator.taping.holes import TapeTracer
from memplan.simulator.taping.layer import (
    IN_FEATURES,
    Single,
    build_layer,
    recipe_of,
    stretch_of,
)
from memplan.simulator.taping.model import CARD
from memplan.simulator.taping.polynomials import (
    BATCH,
    LENGTH_PRIMES,
    LENGTHS,
    Dimensions,
)
from memplan.simulator.trace import Tracer
from memplan.tape import CachedLayer, CacheTape, LayerRegime, Stretch
from memplan.training import model as training_model
from memplan.training.batch import make_batch

_SIDES = Dimensions(
    {"B": (BATCH, BATCH), "T": (LENGTHS[0], LENGTH_PRIMES[0])},
)


def trace_pass(regime: LayerRegime, *, fused: bool) -> Stretch:
    """The forward of a linear layer without autograd; its net is the output.

    `fused` says whether 4-bit weights are read by bitsandbytes' own kernel, which few
    tokens take, or dequantised first.
    """
    log = EventLog()
    tracer = TapeTracer(find_gpu(CARD), log, padded=False)
    with (
        no_warnings(),
        no_initialization(),
        Reroute(tracer, recipe_of(regime)).installed(),
        mock.patch.object(quantized, "_is_fused", lambda *asked: fused),
        torch.no_grad(),
        tracer,
    ):
        model = build_layer(regime).eval()
        for tensor in (*model.parameters(), *model.buffers()):
            tracer.ignore(tensor)
        single = next(m for m in model.modules() if isinstance(m, Single))
        log.begin("1.forward")
        shape = (BATCH, LENGTHS[0], IN_FEATURES)
        x = torch.empty(shape, dtype=getattr(torch, regime.input_dtype), device="meta")
        begin = len(log.events)
        y = single(x)
        end = len(log.events)
        del x, y
        tracer.stop()
    return stretch_of(log, begin, end)


def trace_cache(architecture: Architecture) -> CacheTape:
    """What each kind of layer keeps of the tokens that it has read.

    Raises InputError for models that do not keep it layer by layer.
    """
    stack = architecture.main_stack
    blocks = [block for block in architecture.blocks if block.stack == stack]
    cached = [layer if _tensors(layer) else None for layer in _caches(architecture)]
    kinds = []
    for block in blocks:
        own = [cached[n] for n in block.layers if n < len(cached) and cached[n]]
        if not own and not any(cached):
            problem = "keeps what it has read in a way that cannot be estimated"
            remedy = "use `memplan simulate`"
            raise InputError("model", architecture.name, problem, remedy)
        kinds.append(_layer(own))
    return CacheTape(layers=tuple(kinds))


def _caches(architecture: Architecture) -> list[Any]:
    """The cache's layers after a batch was read."""
    recipe = Recipe(method="full", batch_size=BATCH, sequence_length=LENGTHS[0])
    tracer = Tracer(find_gpu(CARD), EventLog(), padded=False)
    with no_warnings(), no_initialization():
        model: Any = training_model.build(architecture, recipe).eval()
        with Reroute(tracer, recipe).installed(), torch.no_grad(), tracer:
            device = torch.device("meta")
            batch = make_batch(recipe, architecture.vocab_size, device)
            outputs = model(input_ids=batch["input_ids"], use_cache=True)
            tracer.stop()
    return list(getattr(outputs.get("past_key_values"), "layers", ()))


def _layer(own: list[Any]) -> CachedLayer:
    """What those layers keep, which are of one kind."""
    if not own:
        return CachedLayer(count=0, tensors=(), window=None, grows=False)
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in _tensors(own[0])
    }
    return CachedLayer(
        count=len(own),
        tensors=tuple(_SIDES.monomial(size) for size in storages.values()),
        window=getattr(own[0], "sliding_window", None),
        grows=type(own[0]).__name__ in GROWING_LAYERS,
    )


def _tensors(layer: Any) -> list[torch.Tensor]:
    """What a layer keeps of every sequence; its few counters are left out."""
    return [tensor for tensor in held_tensors(vars(layer).values()) if tensor.dim() > 1]
