"""The gradient of advanced indexing: rows are added at sorted positions.

Source: aten/src/ATen/native/cuda/Indexing.cu, `index_put_with_sort_kernel`.
"""

from __future__ import annotations

from memplan.simulator.operators import Call, rule


@rule("aten::index_put", "aten::_index_put_impl_", "aten::index_put_")
def index_put(call: Call) -> None:
    """With accumulation: linear, sorted and original positions, and the sort's scratch."""
    values = call.args[2]
    accumulate = call.argument(3, "accumulate", False)
    call.outputs()
    if not accumulate:
        return
    indices = [index for index in call.args[1] if index is not None]
    count = max((index.numel() for index in indices), default=values.numel())
    for _ in range(3):
        call.temporary(8 * count)
    positions = call.temporary(8 * count)
    sort_scratch = call.temporary(16 * count)
    call.free(sort_scratch)
    call.free(positions)
