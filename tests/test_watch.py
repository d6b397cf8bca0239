"""The context manager for plain loops, as a user's script has it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_callback import LORA, TOKENS, lora_model
from torch.utils._python_dispatch import _get_current_dispatch_mode

from memplan import callback, runs
from memplan.callback import Watch, watch
from memplan.errors import InputError
from memplan.profiler.cpu_meter import CpuMeter
from memplan.recipe import Recipe
from memplan.units import MIB

BATCH = 2
RECIPE = Recipe(
    rank=4,
    targets=tuple(sorted(LORA.target_modules)),
    batch_size=BATCH,
    sequence_length=TOKENS,
)


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]


def run_step(model: Any, optimizer: torch.optim.Optimizer, micro: int = 1) -> None:
    """The outputs are held until the step is over, as in a script."""
    for _ in range(micro):
        outputs = None
        tokens = torch.randint(0, 1024, (BATCH, TOKENS))
        outputs = model(input_ids=tokens, labels=tokens)
        (outputs.loss / micro).backward()
    torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def model() -> Any:
    return lora_model()


@pytest.fixture
def optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), foreach=True)


def test_the_verdict_is_there_while_the_loop_goes_on(
    model: Any,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Kept, compared and logged before the third step; nothing watches after it."""
    caplog.set_level(logging.INFO, "memplan")
    kept = []
    with watch(model, optimizer, RECIPE, name="tiny", out=tmp_path) as seen:
        for _ in range(4):
            run_step(model, optimizer)
            kept.append(len(runs.load(tmp_path)))

    assert kept == [0, 0, 1, 1]
    assert seen.verdict is not None
    assert abs(seen.verdict.errors["allocated"]) < 0.01
    assert seen.verdict.sentence() in caplog.text
    (run,) = runs.load(tmp_path)
    assert run == seen.verdict.run
    assert (run.device, run.outcome, run.model) == ("cpu", "ok", "tiny")
    assert run.parameters["trainable"] == sum(p.numel() for p in trained(model))
    assert run.footprint is not None
    assert [moment.label for moment in run.footprint.moments] == [
        f"{step}.{phase}"
        for step in (1, 2)
        for phase in ("forward", "backward", "optimizer")
    ]
    assert all(m.allocated_bytes > 0 for m in run.footprint.moments)
    check_nothing_watches(model, optimizer)


def check_nothing_watches(model: Any, optimizer: Any) -> None:
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert _get_current_dispatch_mode() is None


def test_phases_are_as_predicted_one_by_one(
    model: Any, optimizer: torch.optim.Optimizer
) -> None:
    """With micro-batches; what clipping takes counts as backward."""
    recipe = dataclasses.replace(RECIPE, accumulation=2)
    with watch(model, optimizer, recipe, name="tiny", out=None) as seen:
        for _ in range(2):
            run_step(model, optimizer, micro=2)

    assert seen.verdict is not None
    measured = seen.verdict.run.footprint
    assert measured is not None
    predicted = {m.label: m.allocated_bytes for m in seen.verdict.predicted.moments}
    for moment in measured.moments:
        assert moment.allocated_bytes == pytest.approx(
            predicted[moment.label], rel=0.01
        )


def test_what_the_loop_switches_on_does_not_reach_the_prediction(
    model: Any, optimizer: torch.optim.Optimizer
) -> None:
    """The verdict is found within the third forward, under the loop's autocast."""
    recipe = dataclasses.replace(RECIPE, autocast="bfloat16")
    with watch(model, optimizer, recipe, name="tiny", out=None) as seen:
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                run_step(model, optimizer)

    assert seen.verdict is not None
    alone = callback._predict(seen.verdict.run)
    assert seen.verdict.predicted == alone


def test_a_loop_that_fails_leaves_no_trace_and_its_own_error(
    model: Any, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    def loop() -> None:
        with watch(model, optimizer, RECIPE, out=tmp_path):
            run_step(model, optimizer)
            run_step(model, optimizer)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()

    assert runs.load(tmp_path) == ()
    check_nothing_watches(model, optimizer)


def test_a_loop_ends_with_its_last_step(
    model: Any, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    """As many steps as are read: what was read is judged when the loop is over."""
    with watch(model, optimizer, RECIPE, name="tiny", out=tmp_path) as seen:
        run_step(model, optimizer)
        run_step(model, optimizer)
        assert seen.verdict is None

    assert seen.verdict is not None
    assert len(runs.load(tmp_path)) == 1


def test_a_recipe_of_another_fine_tune_is_said(
    model: Any, optimizer: torch.optim.Optimizer, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = dataclasses.replace(RECIPE, rank=8)
    with watch(model, optimizer, recipe, name="tiny", out=None):
        run_step(model, optimizer)
        run_step(model, optimizer)

    numbers = sum(p.numel() for p in trained(model))
    assert f"trains {numbers} numbers and the recipe {2 * numbers}" in caplog.text


def test_what_cannot_be_kept_is_said_and_training_goes_on(
    model: Any,
    optimizer: torch.optim.Optimizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("")
    with watch(model, optimizer, RECIPE, name="tiny", out=tmp_path / "file") as seen:
        for _ in range(4):
            run_step(model, optimizer)

    assert seen.verdict is None
    assert "memplan cannot compare this training" in caplog.text


CARD_BYTES = 512 * MIB
CONTEXT_BYTES = 256 * MIB
"""What is planned for a card that the catalog does not know."""


class CardMeter(CpuMeter):
    """The meter of a card whose allocator reserves what tensors take."""

    def finish(self, optimizer: Any) -> dict[str, Any]:
        return {"context_bytes": CONTEXT_BYTES, "driver": {}, "segments": {}}


@contextlib.contextmanager
def small_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    told = {
        "name": "Small",
        "capacity_bytes": CARD_BYTES,
        "compute_capability": [8, 6],
        "native_bf16": True,
    }
    with monkeypatch.context() as patched:
        patched.setattr(callback, "_device_of", lambda model: "cuda")
        patched.setattr(callback, "CudaMeter", CardMeter)
        patched.setattr(callback, "card", lambda: told)
        patched.setattr(callback, "environment", lambda device: {"torch": "2.13.0"})
        yield


@pytest.mark.parametrize(("longest", "warned"), [(TOKENS, False), (8192, True)])
def test_the_longest_batch_is_warned_of_after_the_first_steps(  # noqa: PLR0913
    model: Any,
    optimizer: torch.optim.Optimizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    longest: int,
    warned: bool,
) -> None:
    """The recipe says how long sequences may be; the first ones were short."""
    recipe = dataclasses.replace(RECIPE, sequence_length=longest)
    with (
        small_card(monkeypatch),
        watch(model, optimizer, recipe, name="tiny", out=None) as seen,
    ):
        for _ in range(3):
            run_step(model, optimizer)
            said = "tokens are to come" in caplog.text

    assert seen.verdict is not None
    run = seen.verdict.run
    assert (run.device, run.card) == ("cuda", "Small")
    assert run.recipe.sequence_length == TOKENS
    assert said == warned
    assert (f"Sequences of {longest} tokens are to come" in caplog.text) == warned


def test_another_card_than_the_first_is_refused() -> None:
    class Elsewhere(torch.nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            place = torch.device("cuda", 1)
            yield type("Parameter", (), {"device": place})()

    with pytest.raises(InputError, match=r"cuda:1.*first card"):
        Watch(Elsewhere(), torch.optim.SGD([torch.zeros(1)]))
