"""Inference in closed form: against arithmetic, and against the simulated grid."""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
from typing import Any
from unittest import mock

import inference_report
import pytest

from memplan import tapes
from memplan.catalog import inspect
from memplan.errors import InputError, MissingExtraError
from memplan.estimator import inference as closed_form
from memplan.generation import SAMPLINGS, STATIC
from memplan.gpu import find_gpu
from memplan.inference import ADAPTERS, MERGED, NONE, SEPARATE, Inference
from memplan.recipe import Recipe
from memplan.store import read_json

CARD = find_gpu("RTX 3060")
AMPLE = dataclasses.replace(find_gpu("A100-SXM4-80GB"), capacity_bytes=10**13)
LLAMA = "meta-llama/Llama-2-7b-hf"

MEDIAN_BAR, BAR = 0.01, 0.03
SHARE_WITHIN = 0.9
"""Of the rows; reports/accuracy_inference.md lists those that are further off."""


def run(model: str, inference: Inference, **keys: Any) -> closed_form.InferenceEstimate:
    return closed_form.run(inspect(model), Recipe(**keys), inference, CARD)


@pytest.mark.parametrize(
    ("model", "bytes_a_token"),
    [
        # 2 (keys, values) x layers x key heads x head size x 2 bytes.
        (LLAMA, 2 * 32 * 32 * 128 * 2),
        ("meta-llama/Meta-Llama-3-8B", 2 * 32 * 8 * 128 * 2),
        ("Qwen/Qwen2.5-0.5B", 2 * 24 * 2 * 64 * 2),
        ("openai-community/gpt2", 2 * 12 * 12 * 64 * 2),
        ("tiiuae/falcon-7b", 2 * 32 * 1 * 64 * 2),
        ("google/gemma-3-1b-pt", 2 * 26 * 1 * 256 * 2),
    ],
)
def test_keys_and_values_are_heads_times_tokens(model: str, bytes_a_token: int) -> None:
    parts = run(model, Inference()).parts

    assert closed_form.kv_bytes(parts, 3, 100) == 300 * bytes_a_token


def test_sliding_layers_keep_their_window_alone_once_tokens_come_one_by_one() -> None:
    parts = run("google/gemma-3-1b-pt", Inference()).parts
    each = 2 * 256 * 2

    # 22 of 26 layers see 512 tokens.
    windowed = closed_form.windowed_kv_bytes(parts, 1, 2000)
    assert windowed == each * (22 * 512 + 4 * 2000)
    assert closed_form.kv_bytes(parts, 1, 2000) == each * 26 * 2000


def test_single_precision_takes_twice_as_much() -> None:
    half, single = (
        closed_form.kv_bytes(run(LLAMA, Inference(), dtype=dtype).parts, 1, 512)
        for dtype in ("bfloat16", "float32")
    )

    assert single == 2 * half


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_terms_sum_to_the_devices_bytes(adapters: str) -> None:
    found = run(
        LLAMA, Inference(adapters=adapters), quantization="nf4-double", batch_size=8
    )

    footprint = found.footprint
    terms = closed_form.inference_terms(found)
    device = footprint.device_bytes(footprint.peak)
    assert sum(term.num_bytes for term in terms) == device
    for term in terms:
        assert sum(share.num_bytes for share in term.shares) == term.num_bytes
        assert all(share.num_bytes >= 0 for share in term.shares)


def test_moments_are_those_of_the_way_adapters_are_held() -> None:
    labels = {
        adapters: [
            m.label for m in run(LLAMA, Inference(adapters=adapters)).footprint.moments
        ]
        for adapters in ADAPTERS
    }

    assert labels[SEPARATE] == ["load", "adapt", "prefill", "decode"]
    assert labels[MERGED] == ["load", "adapt", "merge", "prefill", "decode"]
    assert labels[NONE] == ["load", "prefill", "decode"]


def test_what_still_fits_does_and_more_does_not() -> None:
    inference = Inference(num_tokens=64)
    keys: dict[str, Any] = {"quantization": "nf4-double"}
    room = closed_form.limits(run(LLAMA, inference, **keys), CARD)

    assert room.batch_size is not None
    fitting, too_many = (
        run(LLAMA, inference, **keys, batch_size=room.batch_size + more).footprint.fits
        for more in (0, 1)
    )
    assert fitting
    assert not too_many


def test_the_estimate_is_as_near_to_the_simulation_as_is_said() -> None:
    def refuse(architecture: object) -> None:
        raise MissingExtraError("tracing", "torch", "torch")

    errors = []
    with mock.patch.object(tapes, "_taping", refuse):
        for row in read_json(inference_report.FILE):
            try:
                errors.append(abs(inference_report.judge(row).peak))
            except MissingExtraError:
                continue

    assert len(errors) >= 25
    assert statistics.median(errors) <= MEDIAN_BAR
    within = sum(error <= BAR for error in errors) / len(errors)
    assert within >= SHARE_WITHIN


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("batch_size", [1, 64, 200])
def test_choosing_a_token_is_estimated_as_it_is_simulated(
    sampling: str, batch_size: int
) -> None:
    """Short prompts, of which the scores are most of what is above the weights."""
    pytest.importorskip("torch")
    from memplan.simulator import inference as simulator

    model = inspect("Qwen/Qwen2.5-0.5B")
    recipe = Recipe(method="full", batch_size=batch_size, sequence_length=8)
    asked = Inference(num_tokens=4, sampling=sampling)

    estimated = closed_form.run(model, recipe, asked, AMPLE).footprint
    simulated = simulator.run(model, recipe, asked, AMPLE).footprint

    weights = simulated.moments[0].end_allocated_bytes
    for one, other in zip(estimated.moments[1:], simulated.moments[1:], strict=True):
        assert one.label == other.label
        assert one.allocated_bytes - weights == pytest.approx(
            other.allocated_bytes - weights, rel=BAR, abs=2**20
        )


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(InputError, match="at most 24"):
        run(
            "openai-community/gpt2",
            Inference(num_tokens=25),
            sequence_length=1000,
        )


def test_a_static_cache_is_left_to_the_simulation() -> None:
    with pytest.raises(InputError, match="memplan simulate"):
        run(LLAMA, Inference(cache=STATIC))


def test_no_torch_is_imported() -> None:
    program = (
        "import sys; from memplan.catalog import inspect; "
        "from memplan.estimator import inference; "
        "from memplan.inference import Inference; from memplan.recipe import Recipe; "
        f"inference.run(inspect({LLAMA!r}), Recipe(), Inference()); "
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
