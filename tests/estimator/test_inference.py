"""Inference in closed form: against arithmetic, and against the simulated grid."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import subprocess
import sys
from typing import Any
from unittest import mock

import inference_report
import pytest

from memplan import tapes
from memplan.catalog import catalog_models, inspect
from memplan.errors import InputError, MissingExtraError
from memplan.estimator import inference as closed_form
from memplan.generation import CACHES, SAMPLINGS, STATIC
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


def test_a_static_cache_of_a_model_without_positions_for_it_is_refused() -> None:
    with pytest.raises(InputError, match="leave it out"):
        run("bigscience/bloom-560m", Inference(cache=STATIC))


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(InputError, match="at most 24"):
        run(
            "openai-community/gpt2",
            Inference(num_tokens=25),
            sequence_length=1000,
        )


def test_a_static_cache_is_there_for_all_tokens_at_once() -> None:
    prompt, answer = 512, 256
    asked = Inference(num_tokens=answer, cache=STATIC)
    parts = run(LLAMA, asked, sequence_length=prompt, batch_size=3).parts

    points = [*closed_form.prefill_points(parts), *closed_form.decode_points(parts)]

    # The last token is not read again.
    whole = 3 * (prompt + answer - 1) * 2 * 32 * 32 * 128 * 2
    assert {point.kv_cache for point in points} == {0, whole}


STATIC_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "what is read is attended to without a mask": (
        "meta-llama/Llama-3.2-1B",
        "H100 80GB HBM3",
        {"batch_size": 4},
    ),
    "scores are as wide as the cache": (
        "Qwen/Qwen2.5-0.5B",
        "RTX 3060",
        {"batch_size": 4, "attention": "eager"},
    ),
    "so is the mask of a padded batch": (
        "Qwen/Qwen2.5-0.5B",
        "RTX 3060",
        {"batch_size": 16, "padded": True},
    ),
    "a window that is reached while answering is masked from the start": (
        "google/gemma-3-1b-pt",
        "A100-SXM4-80GB",
        {"batch_size": 8},
    ),
    "one that prompts outgrow holds but its own": (
        "google/gemma-3-1b-pt",
        "RTX 3060",
        {"batch_size": 2, "sequence_length": 700},
    ),
}


@pytest.mark.parametrize(
    ("model", "card", "keys"), STATIC_ROWS.values(), ids=STATIC_ROWS
)
def test_a_static_cache_is_estimated_as_it_is_simulated(
    model: str, card: str, keys: dict[str, Any]
) -> None:
    asked = {"new_tokens": 300, "adapters": NONE, "cache": STATIC}

    assert error_of(model, card, {"sequence_length": 300} | keys, asked) <= BAR


@pytest.mark.parametrize("adapters", ADAPTERS)
def test_experts_are_estimated_as_they_are_simulated(adapters: str) -> None:
    keys = {"quantization": "nf4", "adapter_dtype": "bfloat16", "sequence_length": 256}
    asked = {"new_tokens": 4, "adapters": adapters}

    for error in errors_of("Qwen/Qwen3-30B-A3B", "RTX 3060", keys, asked).values():
        assert abs(error) <= MEDIAN_BAR


def test_the_dense_update_of_one_stack_of_experts_is_there_while_it_runs() -> None:
    keys: dict[str, Any] = {"sequence_length": 16, "rank": 8}
    one, other = (
        run("mistralai/Mixtral-8x7B-v0.1", Inference(adapters=how), **keys).footprint
        for how in (SEPARATE, NONE)
    )

    # gate_up_proj of 8 experts, 4096 -> 2 x 14336, and down_proj, in bfloat16.
    stacks = 8 * (2 * 14336 * 4096 + 14336 * 4096) * 2
    more = one.breakdown["activations"] - other.breakdown["activations"]
    assert stacks <= more <= 1.05 * stacks


@pytest.mark.parametrize(
    "keys", [{"method": "dora"}, {"targets": ("gate_proj", "up_proj")}]
)
def test_experts_that_cannot_be_adapted_are_refused_unless_nothing_is(
    keys: dict[str, Any],
) -> None:
    model = "deepseek-ai/DeepSeek-V2-Lite"

    assert run(model, Inference(adapters=NONE), **keys).footprint.moments
    with pytest.raises(InputError, match="stacked experts"):
        run(model, Inference(), **keys)


def test_loaded_adapters_are_single_whatever_their_file_is() -> None:
    half, single = (
        run(LLAMA, Inference(), adapter_dtype=dtype).footprint
        for dtype in ("bfloat16", "float32")
    )

    assert half.breakdown == single.breakdown
    read = {moment.label: moment.breakdown["adapters"] for moment in half.moments}
    # Half as much as it becomes is in the file.
    assert read["adapt"] == 1.5 * read["prefill"]


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [
        ("none", "float16"),
        ("int8", "bfloat16"),
        ("nf4", "bfloat16"),
        ("nf4", "float32"),
    ],
)
def test_magnitudes_are_made_and_merged_as_simulated(
    quantization: str, dtype: str
) -> None:
    keys = {"method": "dora", "quantization": quantization, "dtype": dtype, "rank": 8}
    asked = {"new_tokens": 1, "adapters": MERGED}
    model = "meta-llama/Llama-3.2-1B"

    errors = errors_of(model, "RTX 3060", keys | {"sequence_length": 8}, asked)

    assert abs(errors["adapt"]) <= MEDIAN_BAR
    assert abs(errors["merge"]) <= MEDIAN_BAR


def test_nothing_drops_out_while_a_model_answers() -> None:
    """GPT-2's dropout takes a score matrix and more while it is trained."""
    keys = {"batch_size": 4, "sequence_length": 512, "quantization": "int8"}
    asked = {"new_tokens": 4, "adapters": NONE}

    assert error_of("openai-community/gpt2", "T4", keys, asked) <= BAR


def error_of(
    model: str, card: str, keys: dict[str, Any], asked: dict[str, Any]
) -> float:
    """Of the peak."""
    return abs(_judged(model, card, keys, asked).peak)


def errors_of(
    model: str, card: str, keys: dict[str, Any], asked: dict[str, Any]
) -> dict[str, float]:
    """By moment."""
    return _judged(model, card, keys, asked).by_moment


def _judged(
    model: str, card: str, keys: dict[str, Any], asked: dict[str, Any]
) -> inference_report.Judged:
    """The estimate beside a simulation that is run here."""
    pytest.importorskip("torch")
    row = {"model": model, "gpu": card, "recipe": keys, "inference": asked}
    return inference_report.judge(inference_report.simulate(row))


@pytest.mark.parametrize("cache", CACHES)
def test_every_model_of_the_catalog_answers_by_shipped_tapes(cache: str) -> None:
    def refuse(architecture: object) -> None:
        raise MissingExtraError("tracing", "torch", "torch")

    cards = {"A100-SXM4-80GB": "bfloat16", "H100": "bfloat16", "T4": "float16"}
    with mock.patch.object(tapes, "_taping", refuse):
        for model in catalog_models():
            architecture = model.architecture
            # Whose cache cannot be static.
            if not architecture.generative or architecture.model_type == "bloom":
                continue
            for (card, dtype), adapters in itertools.product(cards.items(), ADAPTERS):
                inference = Inference(cache=cache, adapters=adapters)
                closed_form.run(
                    architecture, Recipe(dtype=dtype), inference, find_gpu(card)
                )


def test_no_torch_is_imported() -> None:
    program = (
        "import sys; from memplan.catalog import inspect; "
        "from memplan.estimator import inference; "
        "from memplan.inference import Inference; from memplan.recipe import Recipe; "
        f"inference.run(inspect({LLAMA!r}), Recipe(), Inference()); "
        "assert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    )

    subprocess.run([sys.executable, "-c", program], check=True)
