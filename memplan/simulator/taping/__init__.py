"""Reading tapes off real steps: models with holes, linear layers, heads and losses."""

from __future__ import annotations

from memplan.simulator.taping.layer import trace_layer, track_layer
from memplan.simulator.taping.loss import trace_loss, track_loss
from memplan.simulator.taping.model import trace_model, track_model

__all__ = [
    "trace_layer",
    "trace_loss",
    "trace_model",
    "track_layer",
    "track_loss",
    "track_model",
]
