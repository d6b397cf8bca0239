"""The moments beside the steps, worked out by hand for small models."""

from __future__ import annotations

import math
from typing import Any

import pytest
from bitsandbytes import functional
from event_logs import events_of

from memplan import inspector, simulator
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture
from memplan.generation import Generation
from memplan.gpu import find_gpu
from memplan.life import CARD, HOST, Evaluation, Life, LifeOptions
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.simulation import Sample
from memplan.simulator import life as simulator_life
from memplan.simulator.events import FREE, EventLog
from memplan.simulator.host import load_bytes
from memplan.simulator.replay import replay, samples

H, FFN, V, LAYERS, HEADS, KV_HEADS = 64, 96, 128, 2, 4, 2
HEAD_DIM = H // HEADS
CONFIG = {
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": H,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": V,
    "tie_word_embeddings": False,
}
LINEARS = {"q": H * H, "k": H * H // 2, "v": H * H // 2, "o": H * H, "mlp": H * FFN}
BATCH, LENGTH, RANK = 2, 16, 4
TRAINED = LAYERS * RANK * (2 * 2 * H + 2 * (H + H // 2) + 3 * (H + FFN))
CARD_80GB = find_gpu("80GB")


def architecture(**changes: Any) -> Architecture:
    config = CONFIG | changes
    return inspector.inspect(ModelSource(name="small", origin="file", config=config))


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return architecture()


def recipe(**keys: Any) -> Recipe:
    return Recipe(
        **{"batch_size": BATCH, "sequence_length": LENGTH, "rank": RANK} | keys
    )


def trace(asked: Architecture, life: Life, **keys: Any) -> simulator.Trace:
    return simulator.trace(asked, recipe(**keys), CARD_80GB, life=life)


def moments(log: EventLog) -> dict[str, tuple[int, int, int]]:
    found = replay(log, AllocatorSettings(), None).moments
    return {
        moment.label: (
            moment.allocated_bytes,
            moment.reserved_bytes,
            moment.end_allocated_bytes,
        )
        for moment in found
    }


def born(log: EventLog, label: str, operator: str, category: str = "") -> list[int]:
    return [
        num_bytes
        for block, num_bytes in events_of(log, label)
        if block >= 0
        and num_bytes != FREE
        and log.operators[block] == operator
        and category in ("", log.categories[block])
    ]


LIVES = {
    "evaluated": Life(evaluation=Evaluation(batch_size=4, num_batches=3)),
    "generating": Life(generation=Generation(batch_size=3, num_tokens=9)),
    "merged": Life(merge=CARD, saves=True, resumes=True),
}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, {"trainer": "transformers"}),
        ({}, {"quantization": "nf4-double", "optimizer": "paged-adamw-8bit"}),
        # Two kinds of layers, of which the config says each one's.
        ({"model_type": "gemma2", "num_hidden_layers": 14}, {"method": "full"}),
        pytest.param(
            {},
            {"quantization": "int8", "method": "dora", "trainer": "trl"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_layers_that_repeat_do_so_in_every_moment(
    changes: dict[str, Any], keys: dict[str, Any]
) -> None:
    deep = architecture(**{"num_hidden_layers": 10, "sliding_window": 8} | changes)
    life = Life(
        evaluation=LIVES["evaluated"].evaluation,
        generation=LIVES["generating"].generation,
        merge=None if keys.get("method") == "full" else CARD,
        saves=True,
        resumes=True,
    )
    few = trace(deep, life, **keys)
    whole = simulator.trace(deep, recipe(**keys), CARD_80GB, life=life, whole=True)

    assert few.num_traced_layers in (6, 8)
    assert whole.num_traced_layers is None
    assert moments(few.log) == moments(whole.log)
    assert few.trainable_parameters == whole.trainable_parameters
    assert {"evaluate", "generate", "save"} < moments(few.log).keys()


@pytest.mark.parametrize("trainer", ["plain", "transformers"])
def test_batches_amid_others_need_not_be_run(
    llama: Architecture, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(evaluation=Evaluation(batch_size=4, num_batches=6))
    few = trace(llama, life, trainer=trainer)
    monkeypatch.setattr(simulator_life, "WHOLE_FORWARDS", 6)
    every = trace(llama, life, trainer=trainer)

    assert len(few.log.events) < len(every.log.events)
    assert moments(few.log) == moments(every.log)


def test_tokens_amid_others_need_not_be_run(
    llama: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = Life(generation=Generation(batch_size=3, num_tokens=20))
    few = trace(llama, life)
    monkeypatch.setattr(simulator_life, "WHOLE_DECODES", 20)
    every = trace(llama, life)

    assert len(few.log.events) < len(every.log.events)
    assert moments(few.log) == moments(every.log)


def test_a_trainer_joins_the_logits_it_keeps(llama: Architecture) -> None:
    # Logits of a batch: 4 x 16 x 128 in bfloat16; joined, two and three batches' worth.
    life = Life(evaluation=Evaluation(batch_size=4, num_batches=3))
    log = trace(llama, life, trainer="transformers").log
    joined = born(log, "evaluate", "aten.cat.default", "logits")
    batch = 4 * LENGTH * V * 2
    assert joined == [2 * batch, 3 * batch]


def test_losses_alone_take_less(llama: Architecture) -> None:
    kept, lost = (
        moments(
            trace(
                llama,
                Life(evaluation=Evaluation(batch_size=4, keeps_logits=keeps)),
                trainer="transformers",
            ).log
        )["evaluate"][0]
        for keeps in (True, False)
    )
    # The first batch's logits and labels, while the second's are computed.
    assert kept - lost == 4 * LENGTH * V * 2 + 4 * LENGTH * 8


def test_gradients_are_gone_and_state_is_there_in_evaluation(
    llama: Architecture,
) -> None:
    found = moments(trace(llama, LIVES["evaluated"], trainer="transformers").log)
    *_, end_of_steps = found["2.optimizer"]
    *_, end = found["evaluate"]
    assert end == end_of_steps


@pytest.mark.parametrize(
    ("trainer", "keeps_logits", "has_logits"),
    [
        ("transformers", False, False),
        ("transformers", True, True),
        # A bare loop, and SFTTrainer, do not ask for the loss alone.
        ("plain", False, True),
        ("trl", False, True),
    ],
)
def test_trainer_evaluates_liger_s_loss_without_logits(
    llama: Architecture, trainer: str, keeps_logits: bool, has_logits: bool
) -> None:
    evaluation = Evaluation(batch_size=4, keeps_logits=keeps_logits)
    keys = {"trainer": trainer, "loss": "liger"}
    log = trace(llama, Life(evaluation=evaluation), **keys).log
    logits = 4 * LENGTH * V * 2

    blocks = [block for block, size in events_of(log, "evaluate") if size == logits]
    assert any(log.categories[block] == "logits" for block in blocks) == has_logits


def test_the_cache_grows_by_a_token_at_a_time(llama: Architecture) -> None:
    # Keys and values of a layer: B x heads x length x head_dim in bfloat16.
    log = trace(llama, LIVES["generating"]).log
    grown = born(log, "generate", "aten.cat.default")
    token = 3 * KV_HEADS * HEAD_DIM * 2
    for length in range(LENGTH, LENGTH + 9):
        assert grown.count(length * token) >= 2 * LAYERS
    assert grown.count((LENGTH + 9) * token) == 0


def test_sliding_windows_bound_the_cache() -> None:
    window = 8
    sliding = architecture(
        model_type="mistral", sliding_window=window, num_hidden_layers=2
    )
    life = Life(generation=Generation(batch_size=1, num_tokens=20))
    grown = born(trace(sliding, life).log, "generate", "aten.cat.default")
    token = KV_HEADS * HEAD_DIM * 2
    # A window's tokens but one, and the new one.
    assert grown.count(window * token) >= 2 * 2 * 18
    assert grown.count((LENGTH + 5) * token) == 0


def test_the_last_token_s_logits_alone_are_made(llama: Architecture) -> None:
    log = trace(llama, LIVES["generating"]).log
    logits = [
        num_bytes
        for block, num_bytes in events_of(log, "generate")
        if num_bytes != FREE and block >= 0 and log.categories[block] == "logits"
    ]
    # In bfloat16 from the head, and in float32 to choose from; three tokens are run.
    assert sorted(logits) == [3 * V * 2] * 3 + [3 * V * 4] * 3


def test_saving_takes_nothing_of_the_card(llama: Architecture) -> None:
    for keys in ({}, {"method": "full"}):
        log = trace(llama, Life(saves=True), **keys).log
        assert not [block for block, _ in events_of(log, "save") if block >= 0]


def test_a_merge_makes_two_products_of_a_weight_s_size(llama: Architecture) -> None:
    # B A and that times the scale, in float32: at once, for the largest layer.
    log = trace(llama, Life(merge=CARD)).log
    live = peak = 0
    for block, num_bytes in events_of(log, "merge"):
        live += -log.sizes[block] if num_bytes == FREE else num_bytes
        peak = max(peak, live)
    assert peak <= 2 * 4 * LINEARS["mlp"]
    assert born(log, "merge", "aten.mm.default").count(4 * LINEARS["mlp"]) == (
        3 * LAYERS
    )
    # The optimizer holds the adapters, so that they outlive the merge.
    assert live == 0


def test_merging_leaves_bitsandbytes_maps_alone(llama: Architecture) -> None:
    before = dict(functional.name2qmap)
    trace(llama, Life(merge=CARD), quantization="nf4-double")
    assert functional.name2qmap.keys() == before.keys()
    assert all(functional.name2qmap[key] is value for key, value in before.items())


@pytest.mark.parametrize(
    ("optimizer", "per_number"), [("adamw", 8), ("sgd-momentum", 4), ("sgd", 0)]
)
def test_a_resumed_run_has_its_state_before_the_first_step(
    llama: Architecture, optimizer: str, per_number: int
) -> None:
    log = trace(llama, Life(resumes=True), optimizer=optimizer).log
    brought = sum(
        -log.sizes[block] if num_bytes == FREE else num_bytes
        for block, num_bytes in events_of(log, "resume")
    )
    assert brought == per_number * TRAINED
    # Read adapters live beside their own until they are copied.
    assert sum(born(log, "resume", "aten.empty_like.default")) == 4 * TRAINED
    assert moments(log)["1.optimizer"][2] == moments(log)["2.optimizer"][2]


def test_a_resumed_paged_optimizer_is_not_paged() -> None:
    # 16 x 8192 numbers and more in the adapters of the MLP: states of these are paged.
    wide = architecture(intermediate_size=8192, num_hidden_layers=1)
    keys = {"optimizer": "paged-adamw-32bit", "rank": 16}
    fresh = trace(wide, Life(), **keys)
    resumed = trace(wide, Life(resumes=True), **keys)

    assert fresh.paged_bytes == 3 * 16 * 8192 * 8
    assert resumed.paged_bytes == 0
    held = moments(resumed.log)["2.optimizer"][2] - moments(fresh.log)["2.optimizer"][2]
    assert held == fresh.paged_bytes


def test_the_life_s_peak_decides_what_fits(llama: Architecture) -> None:
    life = Life(evaluation=Evaluation(batch_size=512, num_batches=2))
    asked = recipe(trainer="transformers")
    needed = simulator.run(llama, asked, find_gpu("80GB"), life=life).footprint
    assert needed.life_peak.label == "evaluate"
    assert needed.peak.label.startswith(("1.", "2."))

    too_small = needed.peak.reserved_bytes + needed.life_peak.reserved_bytes
    card = find_gpu(f"{too_small // 2}B", context_bytes=0)
    without = simulator.run(llama, asked, card).footprint
    found = simulator.run(llama, asked, card, life=life).footprint
    assert without.fits is True
    assert (found.fits, found.failed_moment) == (False, "evaluate")


def test_samples_are_the_memory_after_each_event(llama: Architecture) -> None:
    log = trace(llama, LIVES["merged"]).log
    taken = [*samples(log, AllocatorSettings(), None)]

    assert [sample.index for sample in taken] == [*range(len(taken))]
    assert len(taken) == len(log.events) - len(log.labels)
    for label, (allocated, reserved, end) in moments(log).items():
        own = [sample for sample in taken if sample.moment == label]
        if not own:
            continue
        assert max(sample.reserved_bytes for sample in own) <= reserved
        assert own[-1].allocated_bytes == end
        assert max(sample.allocated_bytes for sample in own) <= allocated
    assert taken[0].operator == "load"
    assert any(sample.module.endswith("down_proj") for sample in taken)


def test_a_timeline_is_recorded_on_the_card_that_is_asked(llama: Architecture) -> None:
    told: list[Sample] = []
    found = simulator.run(
        llama, recipe(), find_gpu("12GB"), record=lambda taken: told.extend(taken)
    )
    peak = max(sample.allocated_bytes for sample in told)
    assert peak == found.footprint.life_peak.allocated_bytes


PARAMETERS = 2 * V * H + H + LAYERS * (2 * H * H + H * H + 3 * H * FFN + 2 * H)


@pytest.mark.parametrize(
    ("keys", "checkpoint", "copied"),
    [
        # In the checkpoint's own precision nothing is copied.
        ({}, "bfloat16", 0),
        ({"quantization": "nf4"}, "bfloat16", 0),
        # Cast: all of a model that goes by way of the host, else tensor by tensor.
        ({}, "float32", 2 * PARAMETERS),
        ({"quantization": "nf4"}, "float32", 2 * max(V * H, H * FFN)),
        # int8: the weight comes back, and is cast to float16.
        ({"quantization": "int8"}, "bfloat16", 4 * H * FFN),
        (
            {"quantization": "int8", "dtype": "float16"},
            "float16",
            2 * H * FFN,
        ),
    ],
)
def test_the_load_copies_what_it_casts(
    keys: dict[str, Any], checkpoint: str, copied: int
) -> None:
    found = load_bytes(architecture(dtype=checkpoint), recipe(**keys))
    stored = 4 if checkpoint == "float32" else 2
    assert found == {"mapped_bytes": stored * PARAMETERS, "load_bytes": copied}


def test_int8_copies_a_weight_in_columns_into_rows_on_the_host() -> None:
    gpt2 = architecture(model_type="gpt2", n_embd=64, n_layer=2, n_head=4)
    largest = 64 * 4 * 64
    found = load_bytes(gpt2, recipe(quantization="int8"))
    assert found["load_bytes"] == 3 * 2 * largest


def test_the_host_of_a_whole_life(llama: Architecture) -> None:
    life = Life(
        evaluation=Evaluation(batch_size=4, num_batches=3),
        saves=True,
        merge=CARD,
        resumes=True,
    )
    host = simulator.run(llama, recipe(trainer="transformers"), life=life).host
    logits, labels = 4 * LENGTH * V, 4 * LENGTH
    assert host == {
        "mapped_bytes": 2 * PARAMETERS,
        "load_bytes": 0,
        "resume_bytes": 8 * TRAINED,
        # Logits in bfloat16 become float32; one loss a batch; labels are int64.
        "evaluate_bytes": 3 * (logits * (2 + 4) + labels * 8 + 4),
        "save_bytes": 4 * TRAINED,
        "merge_bytes": host["merge_bytes"],
    }
    buffers = 2 * 4 * HEAD_DIM // 2
    assert host["merge_bytes"] == 2 * PARAMETERS + buffers


def test_a_merge_on_the_host_takes_the_base_in_16_bits(llama: Architecture) -> None:
    life = Life(merge=HOST)
    found = simulator.run(llama, recipe(quantization="nf4"), life=life)
    assert "merge" not in [moment.label for moment in found.footprint.moments]
    # Weights and adapters; of the largest layer two products, and the weight cast.
    # No optimizer holds adapters: those of the attention before it are gone by then.
    merged = 4 * RANK * (2 * 2 * H + 2 * (H + H // 2))
    least = 2 * PARAMETERS + 4 * TRAINED - merged + 3 * 4 * LINEARS["mlp"]
    assert math.isclose(found.host["merge_bytes"], least, rel_tol=0.01)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (LifeOptions(), Life()),
        (
            LifeOptions(eval_batch=3),
            Life(evaluation=Evaluation(batch_size=3, num_batches=2)),
        ),
        (
            LifeOptions(prediction_loss_only=True, eval_batches=5),
            Life(
                evaluation=Evaluation(
                    batch_size=BATCH, num_batches=5, keeps_logits=False
                )
            ),
        ),
        (
            LifeOptions(generate=7),
            Life(generation=Generation(batch_size=BATCH, num_tokens=7)),
        ),
        (
            LifeOptions(whole=True, merge=HOST),
            Life(
                evaluation=Evaluation(batch_size=BATCH),
                generation=Generation(batch_size=BATCH, num_tokens=256),
                saves=True,
                merge=HOST,
                resumes=True,
            ),
        ),
    ],
)
def test_options_choose_a_life(
    llama: Architecture, options: LifeOptions, chosen: Life
) -> None:
    assert options.choose(llama, recipe()) == chosen


def test_trainers_evaluate_on_batches_of_eight(llama: Architecture) -> None:
    for trainer in ("transformers", "trl"):
        life = LifeOptions(whole=True).choose(llama, recipe(trainer=trainer))
        assert life.evaluation == Evaluation(batch_size=8)


def test_a_whole_life_does_what_can_be_done() -> None:
    gpt2 = architecture(
        model_type="gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=20
    )
    life = LifeOptions(whole=True).choose(gpt2, recipe(method="full"))
    assert life.merge is None
    assert life.generation == Generation(batch_size=BATCH, num_tokens=20 - LENGTH)
