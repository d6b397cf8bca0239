"""What the estimate's blocks make the allocator reserve, beside the simulation."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from memplan import estimator, tapes, track
from memplan.catalog import inspect
from memplan.errors import MissingExtraError
from memplan.estimator.reserved import fit_into, reserved
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.recipe import Recipe

LLAMA = "meta-llama/Llama-3.2-1B"
CARD = find_gpu("RTX 3060")

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"sequence_length": 1024},
    "qlora": {"quantization": "nf4-double", "checkpointing": "full", "batch_size": 4},
    "int8": {"quantization": "int8", "checkpointing": "full"},
    "chunks, the last of them half as long": {
        "loss": "chunked-nll",
        "checkpointing": "full",
        "sequence_length": 384,
    },
    "full": {"method": "full", "checkpointing": "full", "optimizer": "adamw-fused"},
}


def footprint(**keys: Any) -> Footprint:
    return estimator.estimate(inspect(LLAMA), Recipe(**keys), CARD)


@pytest.mark.parametrize("keys", RECIPES.values(), ids=RECIPES)
def test_every_moment_reserves_what_the_simulation_does(keys: dict[str, Any]) -> None:
    """A block of 4 MiB in another hole moves one of 128 MiB: 3 % of a moment here."""
    from memplan.simulator import simulate

    simulated = simulate(inspect(LLAMA), Recipe(**keys), CARD)

    for ours, theirs in zip(footprint(**keys).moments, simulated.moments, strict=True):
        assert ours.label == theirs.label
        assert ours.reserved_bytes == pytest.approx(theirs.reserved_bytes, rel=0.035)


TRAINED_WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "a head and the embeddings": (
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        {"trained_modules": ("embed_tokens", "lm_head"), "checkpointing": "full"},
    ),
    "a quantised base's in float32": (
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        {"trained_modules": ("lm_head",), "quantization": "nf4-double"},
    ),
    "embeddings that were the head": (
        "Qwen/Qwen2.5-0.5B",
        {"trained_modules": ("embed_tokens",), "quantization": "nf4-double"},
    ),
    "scaled embeddings": (
        "google/gemma-2b",
        {"trained_modules": ("embed_tokens",), "checkpointing": "full"},
    ),
    "a head that was the embeddings": (
        "openai-community/gpt2",
        {"trained_modules": ("wte", "lm_head"), "checkpointing": "full"},
    ),
}


@pytest.mark.parametrize(("model", "keys"), TRAINED_WHOLE.values(), ids=TRAINED_WHOLE)
def test_modules_that_are_trained_whole_have_blocks_of_their_own(
    model: str, keys: dict[str, Any]
) -> None:
    from memplan.simulator import simulate

    recipe = Recipe(**keys | {"batch_size": 2, "sequence_length": 1024})
    card = dataclasses.replace(CARD, capacity_bytes=10**12)

    found = estimator.estimate(inspect(model), recipe, card)

    simulated = simulate(inspect(model), recipe, card)
    for ours, theirs in zip(found.moments[1:], simulated.moments[1:], strict=True):
        assert ours.reserved_bytes == pytest.approx(theirs.reserved_bytes, rel=0.01)
    peak = found.peak.allocated_bytes
    assert peak == pytest.approx(simulated.peak.allocated_bytes, rel=0.01)


def test_the_cache_is_what_is_reserved_beyond_what_is_allocated() -> None:
    found = footprint(quantization="nf4-double")

    assert found.breakdown["cache"] > 0
    assert (
        found.notes
        == estimator.run(
            inspect(LLAMA), Recipe(quantization="nf4-double"), CARD
        ).footprint.notes
    )


def test_reserved_bytes_never_fall_and_hold_what_is_allocated() -> None:
    moments = footprint(method="full", accumulation=4).moments

    assert all(m.reserved_bytes >= m.allocated_bytes for m in moments)
    told = [moment.reserved_bytes for moment in moments]
    assert told == sorted(told)


def test_near_its_limit_a_card_gives_the_cache_back() -> None:
    recipe = Recipe(method="full", checkpointing="full")
    parts = estimator.run(inspect(LLAMA), recipe, CARD).parts
    unlimited, _ = fit_into(parts, None)
    tight = max(unlimited.by_moment.values()) - 256 * 2**20

    limited, missing = fit_into(parts, tight)

    assert missing == 0
    assert limited.failed_moment is None
    assert max(limited.by_moment.values()) <= tight


def test_a_card_that_does_not_suffice_names_the_moment_and_what_is_missing() -> None:
    recipe = Recipe(sequence_length=4096)
    found = estimator.estimate(inspect(LLAMA), recipe, find_gpu("6GB"))

    assert found.fits is False
    assert found.failed_moment == "1.forward"
    assert found.missing_bytes > 0
    card = find_gpu("6GB")
    enough = dataclasses.replace(
        card, capacity_bytes=card.capacity_bytes + found.missing_bytes
    )
    assert estimator.estimate(inspect(LLAMA), recipe, enough).fits


OFFLOADED: dict[str, tuple[str, dict[str, Any]]] = {
    "inputs in half precision": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", {}),
    "inputs that are kept for backward": (
        "EleutherAI/pythia-410m",
        {"quantization": "nf4-double"},
    ),
    "of every other layer": (
        "google/gemma-3-1b-pt",
        {"every_n_layers": 2, "quantization": "nf4-double"},
    ),
    "beside gradients": ("Qwen/Qwen2.5-0.5B", {"method": "full"}),
}


@pytest.mark.parametrize(("model", "keys"), OFFLOADED.values(), ids=OFFLOADED)
def test_what_is_offloaded_comes_back_for_backward(
    model: str, keys: dict[str, Any]
) -> None:
    from memplan.simulator import simulate

    shape = {"batch_size": 4, "sequence_length": 1024}
    recipe = Recipe(**keys | shape | {"checkpointing": "full", "offload": True})
    card = dataclasses.replace(CARD, capacity_bytes=10**12)

    found = estimator.estimate(inspect(model), recipe, card)

    simulated = simulate(inspect(model), recipe, card)
    for ours, theirs in zip(found.moments[2:], simulated.moments[2:], strict=True):
        assert ours.reserved_bytes == pytest.approx(theirs.reserved_bytes, rel=0.01)
    peak = found.peak.allocated_bytes
    assert peak == pytest.approx(simulated.peak.allocated_bytes, rel=0.01)
    assert not any("replayed" in note for note in found.notes)


def test_without_torch_what_no_track_is_known_of_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = estimator.run(inspect(LLAMA), Recipe(), CARD).parts

    def missing(*args: object) -> None:
        raise MissingExtraError("tracing", "torch", "torch")

    monkeypatch.setattr(tapes, "model_track", missing)

    found = estimator.estimate(inspect(LLAMA), Recipe(), CARD)

    assert any("tracing one needs torch" in note for note in found.notes)
    assert found.moments[-1].label == "2.optimizer"
    assert parts.architecture.name == LLAMA


def test_small_blocks_come_from_segments_of_their_own() -> None:
    recipe = Recipe(sequence_length=8)
    parts = estimator.run(inspect(LLAMA), recipe, CARD).parts

    found = reserved(parts, 1, 8, None)

    assert 0 < found.small_bytes < max(found.by_moment.values())
    assert found.small_bytes % (2 * 2**20) == 0


def test_a_track_is_the_same_after_it_was_kept() -> None:
    parts = estimator.run(inspect(LLAMA), Recipe(), CARD).parts
    made = tapes.model_track(parts.architecture, parts.regime)

    kept = track.model_track(json.loads(json.dumps(track.to_json(made))))

    assert track.to_json(kept) == track.to_json(made)
    assert kept.blocks[0].foreign == made.blocks[0].foreign
