"""Comparisons that the host asks about.

Positions beyond what a model was first trained on change its frequencies
(transformers.modeling_rope_utils, `longrope_frequency_update`).
"""

from __future__ import annotations

from memplan.simulator.operators import Call, rule


@rule("aten::gt.Scalar")
def greater(call: Call) -> None:
    """The output; a single one is a question whose answer is no."""
    result = call.outputs()
    if result.dim() == 0:
        call.tracer.deny(result)
