"""CUDA's autocast and composites, imitated over meta tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from memplan.gpu import find_gpu
from memplan.recipe import Recipe
from memplan.simulator.events import EventLog
from memplan.simulator.reroute import Reroute
from memplan.simulator.trace import Tracer

BFLOAT16 = Recipe(autocast="bfloat16")


@pytest.fixture
def tracer() -> Iterator[Tracer]:
    tracer = Tracer(find_gpu("A100-80GB"), EventLog(), padded=False)
    with Reroute(tracer, BFLOAT16).installed(), tracer:
        yield tracer


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def names(tracer: Tracer) -> list[str]:
    return [str(func) for func in tracer.operators]


def test_products_run_in_autocasts_precision(tracer: Tracer) -> None:
    x, weight = meta(4, 8), meta(8, 8)
    with torch.autocast("cuda", torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
        assert (x @ weight).dtype == torch.bfloat16
        assert torch.bmm(meta(1, 4, 8), meta(1, 8, 8)).dtype == torch.bfloat16
    assert F.linear(x, weight).dtype == torch.float32


def test_what_needs_range_runs_in_float32(tracer: Tracer) -> None:
    x = meta(4, 8, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert x.pow(2).dtype == torch.float32
        assert torch.rsqrt(x).dtype == torch.float32
        assert F.softmax(x, -1).dtype == torch.float32
        assert F.layer_norm(x, (8,)).dtype == torch.float32
        assert (x + x).dtype == torch.bfloat16


def test_casts_of_trained_weights_are_made_once_a_region(tracer: Tracer) -> None:
    x = meta(4, 8, dtype=torch.bfloat16)
    trained, frozen = meta(8, 8).requires_grad_(), meta(8, 8)
    cast = torch.ops.aten._to_copy.default
    with torch.autocast("cuda", torch.bfloat16):
        for _ in range(3):
            F.linear(x, trained)
        assert tracer.operators[cast] == 1
        for _ in range(3):
            F.linear(x, frozen)
        assert tracer.operators[cast] == 4
    with torch.autocast("cuda", torch.bfloat16):
        F.linear(x, trained)
    assert tracer.operators[cast] == 5


def test_dropout_keeps_a_byte_for_each_number(tracer: Tracer) -> None:
    x = meta(4, 8)
    F.dropout(x, 0.1, True)

    assert tracer.log.sizes == [128, 32, 128]  # x, then the mask before the output
    assert F.dropout(x, 0.0, True) is x


def test_half_precision_is_cast_inside_of_softmax(tracer: Tracer) -> None:
    half, bfloat = meta(4, 8, dtype=torch.float16), meta(4, 8, dtype=torch.bfloat16)

    F.softmax(half, -1, dtype=torch.float32)
    assert "aten._to_copy.default" not in names(tracer)

    F.softmax(bfloat, -1, dtype=torch.float32)
    assert "aten._to_copy.default" in names(tracer)


def test_functions_are_put_back() -> None:
    before = (F.linear, F.softmax, torch.matmul, torch.Tensor.matmul, torch.softmax)
    tracer = Tracer(find_gpu("T4"), EventLog(), padded=False)
    with Reroute(tracer, BFLOAT16).installed():
        assert F.softmax is not before[1]
    after = (F.linear, F.softmax, torch.matmul, torch.Tensor.matmul, torch.softmax)
    assert all(one is other for one, other in zip(before, after, strict=True))
