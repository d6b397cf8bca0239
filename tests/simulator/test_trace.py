"""What the dispatch mode logs for a few operators whose memory is known."""

from __future__ import annotations

import torch
from torch import nn

from memplan.cublas import workspace_bytes
from memplan.gpu import find_gpu
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.trace import Tracer

T4 = find_gpu("T4")
WORKSPACE_BYTES = 8_519_680


def trace() -> tuple[EventLog, Tracer]:
    log = EventLog()
    log.begin("1.forward")
    return log, Tracer(T4, log, padded=False)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def births(log: EventLog) -> list[tuple[str, int]]:
    return [(log.operators[b], n) for b, n in log.events if b >= 0 and n != FREE]


def test_a_storage_is_born_once_and_dies_with_its_last_tensor() -> None:
    log, tracer = trace()
    with tracer:
        x = torch.empty(4, 8, device="meta")
        view = x.view(8, 4)
        del x
        assert (0, FREE) not in log.events
        del view

    assert log.events[1:] == [(0, 128), (0, FREE)]


def test_in_place_operators_allocate_nothing() -> None:
    log, tracer = trace()
    x = meta(4, 8)
    tracer.hold(x, log.allocate(128, "held"))
    with tracer:
        x.mul_(2).add_(x)

    assert births(log) == [("held", 128)]


def test_a_thread_gets_one_cublas_workspace_and_backward_another() -> None:
    log, tracer = trace()
    x, weight = meta(4, 8), meta(8, 8).requires_grad_()
    for tensor in (x, weight):
        tracer.hold(tensor, log.allocate(tensor.nbytes, "held"))
    with tracer:
        y = torch.mm(torch.mm(x, weight), weight)
        y.sum().backward()

    workspaces = [n for _, n in births(log) if n == WORKSPACE_BYTES]
    assert len(workspaces) == 2


def test_hopper_has_a_workspace_of_32_mib() -> None:
    assert workspace_bytes(T4) == WORKSPACE_BYTES
    assert workspace_bytes(find_gpu("H100")) == 32 * 2**20


def test_gradients_that_nobody_else_holds_are_summed_in_place() -> None:
    # h feeds two products: their gradients meet in one buffer, which CUDA adds to.
    log, tracer = trace()
    h = meta(4, 8).requires_grad_()
    first, second = meta(8, 8), meta(8, 8)
    for tensor in (h, first, second):
        tracer.hold(tensor, log.allocate(tensor.nbytes, "held"))
    with tracer:
        x = torch.tanh(h)
        y = torch.mm(x, first) + torch.mm(x, second)
        del x
        y.sum().backward()

    sums = [n for operator, n in births(log) if operator == "aten.add.Tensor"]
    assert sums == [128]  # the sum of the products in forward, none in backward


def test_a_gradient_that_is_shared_is_summed_out_of_place() -> None:
    # The residual passes its gradient on to both branches without a copy.
    log, tracer = trace()
    h = meta(4, 8).requires_grad_()
    tracer.hold(h, log.allocate(h.nbytes, "held"))
    with tracer:
        x = torch.tanh(h)
        y = x + torch.tanh(x)
        del x
        y.backward(torch.empty_like(y))

    sums = [n for operator, n in births(log) if operator == "aten.add.Tensor"]
    assert sums == [128, 128]


def test_blocks_know_their_module_in_forward_and_in_backward() -> None:
    log, tracer = trace()
    model = nn.Sequential(
        nn.Linear(8, 8, device="meta"), nn.Linear(8, 8, device="meta")
    )
    for parameter in model.parameters():
        tracer.hold(parameter, log.allocate(parameter.nbytes, "held"))
    tracer.name_modules(model)
    x = meta(4, 8)
    with tracer:
        model(x).sum().backward()

    products = [
        (log.operators[b], log.modules[b])
        for b, n in log.events
        if b >= 0 and n == 128 and log.operators[b] != "held"
    ]
    assert products[:2] == [("aten.addmm.default", "0"), ("aten.addmm.default", "1")]
    assert ("aten.mm.default", "1") in products


def test_questions_of_the_host_are_answered_as_a_full_batch_would() -> None:
    _, tracer = trace()
    mask = meta(4, dtype=torch.bool)
    with tracer:
        assert bool(mask.all()) is True
        assert meta(1).sum().item() == 1.0
        assert meta(1, dtype=torch.int64).sum().item() == 1

    padded = Tracer(T4, EventLog(), padded=True)
    with padded:
        assert bool(mask.all()) is False


def test_logits_are_known_by_their_last_side() -> None:
    log, tracer = trace()
    tracer.vocab_size = 100
    with tracer:
        torch.empty(2, 100, device="meta")
        torch.empty(100, 2, device="meta")
        torch.empty(100, 2, device="meta").t().to(torch.bfloat16)

    assert log.categories == ["logits", *["activations"] * 3]
