"""Reading tapes off real steps: models with holes, linear layers, losses, caches."""

from __future__ import annotations

from memplan.simulator.taping.inference import trace_cache, trace_pass
from memplan.simulator.taping.layer import trace_layer, track_layer
from memplan.simulator.taping.loss import trace_loss, track_loss
from memplan.simulator.taping.model import trace_model, track_model

__all__ = [
    "trace_cache",
    "trace_layer",
    "trace_loss",
    "trace_model",
    "trace_pass",
    "track_layer",
    "track_loss",
    "track_model",
]
