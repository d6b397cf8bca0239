"""scaled_dot_product_attention over meta tensors, as CUDA would run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.gpu import Gpu, find_gpu
from memplan.recipe import Recipe
from memplan.simulator.attention import Inputs, attend
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.reroute import Reroute
from memplan.simulator.trace import Tracer

T4 = find_gpu("T4")
A100 = find_gpu("A100 80GB")


class Names(TorchDispatchMode):
    """The operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tracer_on(gpu: Gpu) -> tuple[EventLog, Tracer]:
    log = EventLog()
    log.begin("1.forward")
    return log, Tracer(gpu, log, padded=False)


def births(inputs: Inputs, asked: str, gpu: Gpu = A100) -> dict[str, list[int]]:
    """Bytes by operator."""
    log, tracer = tracer_on(gpu)
    for tensor in inputs[:4]:
        if tensor is not None:
            tracer.hold(tensor, log.allocate(0, "held"))
    first = len(log.sizes)
    with tracer:
        attend(inputs, asked, tracer)
    found: dict[str, list[int]] = {}
    for operator, size in zip(log.operators[first:], log.sizes[first:], strict=True):
        found.setdefault(operator.split(".")[1], []).append(size)
    return found


@pytest.mark.parametrize(
    ("columns", "padded"), [(16, []), (20, [2 * 12 * 24 * 2]), (17, [2 * 12 * 24 * 2])]
)
def test_a_mask_is_padded_before_it_is_spread_over_heads(
    columns: int, padded: list[int]
) -> None:
    q, k = meta(2, 4, 12, 64), meta(2, 4, columns, 64)
    mask = meta(2, 1, 12, columns)

    found = births(Inputs(q, k, k, mask), "efficient")

    assert found.get("constant_pad_nd", []) == padded


def test_a_mask_of_truth_values_becomes_one_of_the_querys_precision() -> None:
    q = meta(2, 4, 16, 64)
    mask = meta(2, 1, 16, 16, dtype=torch.bool)

    found = births(Inputs(q, q, q, mask), "efficient")

    assert found["scalar_tensor"] == [2, 2]
    assert found["where"] == [2 * 16 * 16 * 2]


def test_flash_pads_heads_to_eights() -> None:
    q = meta(1, 2, 128, 68)

    found = births(Inputs(q, q, q, is_causal=True), "flash")

    assert found["constant_pad_nd"] == [2 * 128 * 72 * 2] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_math_with_dropout_runs_what_the_original_does(
    dtype: torch.dtype, masked: bool
) -> None:
    """But for dropout's own operators, which CUDA has as one."""
    q, k = meta(2, 4, 8, 16, dtype=dtype), meta(2, 2, 8, 16, dtype=dtype)
    mask = meta(2, 1, 8, 8, dtype=dtype) if masked else None
    inputs = Inputs(q, k, k, mask, 0.1, not masked, None, True)
    _, tracer = tracer_on(A100)

    with Names() as ours:
        attend(inputs, "math", tracer)
    with Names() as original:
        torch.ops.aten._scaled_dot_product_attention_math(
            *inputs[:6], None, scale=None, enable_gqa=True
        )

    dropout = {
        "aten::native_dropout",
        "aten::empty_like",
        "aten::bernoulli_.float",
        "aten::div_.Scalar",
        "aten::mul.Tensor",
    }
    scaling = {"aten::mul.Scalar": "aten::mul.Tensor"}
    kept = [
        [scaling.get(n, n) for n in found.names if scaling.get(n, n) not in dropout]
        for found in (ours, original)
    ]
    assert kept[0] == kept[1]
    assert "aten::native_dropout" in ours.names
    assert "aten::bernoulli_.float" not in ours.names


def test_regions_without_autocast_stay_in_single_precision() -> None:
    """transformers' maybe_autocast switches nothing for meta tensors by itself."""
    from transformers.models.gpt2 import modeling_gpt2

    _, tracer = tracer_on(A100)
    rows = meta(4, 8, dtype=torch.float32)
    reroute = Reroute(tracer, Recipe(autocast="bfloat16"))
    with reroute.installed(), torch.autocast("cuda", torch.bfloat16):
        inside = torch.matmul(rows, rows.t())
        with modeling_gpt2.maybe_autocast(device_type="meta", enabled=False):
            region = torch.matmul(rows, rows.t())

    assert inside.dtype == torch.bfloat16
    assert region.dtype == torch.float32


def test_tensors_kept_on_the_host_leave_the_card_and_come_back() -> None:
    from transformers import modeling_utils

    log, tracer = tracer_on(A100)
    weight = meta(64, 64).requires_grad_()
    tracer.hold(weight, log.allocate(weight.nbytes, "held"))
    with Reroute(tracer, Recipe()).installed(), tracer:
        x = meta(32, 64).requires_grad_()
        with modeling_utils.save_on_cpu(pin_memory=True):
            out = (x * 2).tanh()
        product = next(b for b, name in enumerate(log.operators) if "mul" in name)
        forward = len(log.events)
        out.sum().backward()

    assert (product, FREE) in log.events[:forward]
    back = [log.operators[b] for b, n in log.events[forward:] if n == 32 * 64 * 2]
    assert "aten.empty.memory_format" in back
