"""A task as the measuring process runs it, by each of the loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small import LLAMA, events_of, labels, task

from memplan.errors import InputError
from memplan.inference import MERGED, NONE, SEPARATE, Inference
from memplan.profiler import child, data
from memplan.profiler.task import Journal, Task, read_events

PHASES = {
    "plain": ("forward", "backward", "optimizer"),
    "transformers": ("forward", "backward", "clip", "optimizer"),
    "trl": ("forward", "backward", "clip", "optimizer"),
}
BEFORE = {"plain": ["load", "adapt"]}


@pytest.mark.parametrize("trainer", PHASES)
def test_each_loop_announces_its_phases(trainer: str, tmp_path: Path) -> None:
    asked = task({"trainer": trainer, "accumulation": 2}, folder=str(tmp_path))
    events = events_of(asked, tmp_path)
    forward, backward, *others = PHASES[trainer]

    assert labels(events) == [
        *BEFORE.get(trainer, ["load", "adapt", "trainer"]),
        *(
            f"{step}.{phase}"
            for step in (1, 2)
            for phase in (forward, backward, forward, backward, *others)
        ),
    ]
    steps = [event for event in events if event["event"] == "step"]
    assert [step["number"] for step in steps] == [1, 2]
    for step in steps:
        assert step["loss"] == pytest.approx(math.log(LLAMA["vocab_size"]), rel=0.1)
        assert step["seconds"] > 0


def test_later_steps_share_a_label_and_time_may_be_up_after_the_second(
    tmp_path: Path,
) -> None:
    events = events_of(task(steps=50, seconds=1e-9), tmp_path)

    assert [e["number"] for e in events if e["event"] == "step"] == [1, 2]


@pytest.mark.parametrize(
    ("quantization", "adapters", "moments"),
    [
        ("nf4", NONE, ["load", "prefill", "decode"]),
        ("int8", SEPARATE, ["load", "adapt", "prefill", "decode"]),
        ("none", MERGED, ["load", "adapt", "merge", "prefill", "decode"]),
    ],
)
def test_inference_answers_prompts(
    quantization: str, adapters: str, moments: list[str], tmp_path: Path
) -> None:
    asked = task(
        {"quantization": quantization},
        inference=Inference(num_tokens=3, adapters=adapters),
        folder=str(tmp_path),
    )
    events = events_of(asked, tmp_path)

    assert labels(events) == moments
    (parameters,) = (e for e in events if e["event"] == "parameters")
    assert parameters["trainable"] == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    config = transformers.LlamaConfig(**LLAMA)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("quantization", ["none", "nf4-double", "int8"])
def test_a_checkpoint_s_weights_are_loaded_and_take_what_random_ones_do(
    quantization: str, checkpoint: str, tmp_path: Path
) -> None:
    recipe = {"quantization": quantization}
    ends = {}
    for weights in ("random", "checkpoint"):
        (tmp_path / weights).mkdir()
        asked = task(recipe, weights=weights, model=checkpoint)
        for event in events_of(asked, tmp_path / weights):
            if event["event"] == "moment":
                ends[weights, event["label"]] = event["end_allocated_bytes"]

    for label in ("load", "adapt", "1.optimizer", "2.optimizer"):
        assert ends["checkpoint", label] == pytest.approx(
            ends["random", label], rel=0.01
        )


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    asked = task(weights="checkpoint", model=str(tmp_path / "none"))

    with pytest.raises(InputError, match="cannot be loaded"):
        events_of(asked, tmp_path)


def test_a_config_has_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dict(LLAMA)))

    with pytest.raises(InputError, match="weights lie in a folder"):
        events_of(task(weights="checkpoint", model=str(file)), tmp_path)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"trainer": "trl", "loss": "full"}, "fused head"),
        ({"trainer": "transformers", "keep_outputs": "step"}, "drops the output"),
        ({"attention": "cudnn"}, "CPUs have no such kernel"),
        ({"method": "full", "quantization": "nf4"}, "trains the weights"),
    ],
)
def test_what_a_loop_cannot_do_is_refused(
    recipe: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=match):
        events_of(task(recipe), tmp_path)


def test_what_restarts_cannot_be_asked_by_its_adapters_alone(tmp_path: Path) -> None:
    asked = task({"method": "relora"}, generate=2, folder=str(tmp_path))

    with pytest.raises(InputError, match="--generate: 2 asks adapters alone"):
        events_of(asked, tmp_path)


MILESTONES = [
    ("relora", {}, "restart"),
    ("adaq-lora", {"prune_physically": True, "target_rank": 2}, "prune"),
]


@pytest.mark.parametrize("trainer", PHASES)
@pytest.mark.parametrize(("method", "options", "label"), MILESTONES)
def test_what_a_method_does_between_steps_is_a_moment_and_a_step_follows(
    trainer: str, method: str, options: dict[str, Any], label: str, tmp_path: Path
) -> None:
    recipe = {"trainer": trainer, "method": method, "method_options": options}
    events = events_of(task(recipe, folder=str(tmp_path)), tmp_path)
    found = labels(events)

    assert found.count(label) == 1
    where = found.index(label)
    assert found[where - 1] == "2.optimizer"
    assert found[where + 1 :] == [f"3.{phase}" for phase in PHASES[trainer]]
    assert [e["number"] for e in events if e["event"] == "step"] == [1, 2, 3]
    moments = {e["label"]: e for e in events if e["event"] == "moment"}
    before, after = moments["2.optimizer"], moments["3.optimizer"]
    if label == "prune":
        # Half of the triplets: of parameters, moments and importance.
        freed = before["end_allocated_bytes"] - after["end_allocated_bytes"]
        (told,) = (e for e in events if e["event"] == "parameters")
        share = (4 + 8 + 12) * told["trainable"] // 2
        assert freed == pytest.approx(share, rel=0.1)
    else:
        # But for the batch that a trainer fetches ahead.
        assert after["end_allocated_bytes"] == pytest.approx(
            before["end_allocated_bytes"], abs=1024
        )


def test_time_that_is_up_brings_the_milestone_forward(tmp_path: Path) -> None:
    asked = task({"method": "relora"}, steps=50, seconds=1e-9)
    events = events_of(asked, tmp_path)

    assert [e["number"] for e in events if e["event"] == "step"] == [1, 2, 3]
    assert "restart" in labels(events)


def test_adalora_s_importance_is_there_from_the_first_step(tmp_path: Path) -> None:
    """Twelve bytes of a trained number, which the loop must ask for."""
    ends = {}
    for method in ("adalora", "lora"):
        (tmp_path / method).mkdir()
        events = events_of(task({"method": method, "rank": 8}), tmp_path / method)
        (told,) = (e for e in events if e["event"] == "parameters")
        moments = {e["label"]: e for e in events if e["event"] == "moment"}
        grown = (
            moments["1.optimizer"]["end_allocated_bytes"]
            - moments["adapt"]["end_allocated_bytes"]
        )
        ends[method] = grown / told["trainable"]

    assert ends["lora"] == pytest.approx(8, rel=0.1)
    assert ends["adalora"] == pytest.approx(8 + 12, rel=0.1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_card_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="finds no CUDA device"):
        events_of(task(device="cuda"), tmp_path)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out-of-memory"),
        (MemoryError(), "out-of-memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "out-of-memory",
        ),
        (ValueError("no such thing"), "failed"),
        (InputError("rank", 0, "is too small", "give more"), "refused"),
    ],
)
def test_the_journal_says_how_a_task_ended(
    error: Exception, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "journal.jsonl"
    monkeypatch.setattr("sys.argv", ["child", str(file)])
    monkeypatch.setattr("sys.stdin", Given(task().to_line()))

    def run(*args: Any) -> None:
        raise error

    monkeypatch.setattr(child, "run", run)
    monkeypatch.setattr(child, "_end_with_parent", lambda: None)
    child.main()

    (event,) = read_events(file)
    assert event["status"] == status
    assert (str(error) or "MemoryError") in event["message"]


class Given:
    """Standard input of one line."""

    def __init__(self, line: str) -> None:
        self._line = line

    def readline(self) -> str:
        return self._line


def test_a_task_is_read_back_as_it_was_told() -> None:
    asked = task({"rank_pattern": {".*mlp.*": 2}}, trace="t", seconds=3.5)

    assert Task.from_line(asked.to_line()) == asked


def test_a_line_that_was_cut_short_is_no_event(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    Journal(file).write("begin", label="load")
    with file.open("a") as opened:
        opened.write('{"event": "mom')

    assert [event["label"] for event in read_events(file)] == ["load"]


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One token for each letter."""

    class Letters:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, messages: Any, tokenize: bool) -> str:
            return "".join(message["content"] for message in messages)

    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda name: Letters()
    )


ROWS = [
    {"text": "a" * 5},
    {"messages": [{"content": "b" * 30}]},
    {"prompt": "cc", "completion": "cc"},
]


@pytest.mark.usefixtures("tokenizer")
def test_every_step_trains_on_the_longest_batch_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    asked = task(data=str(file), steps=3)

    rows = data.rows_of(asked, 128)
    batch = next(data.batches(asked, 128, torch.device("cpu")))

    # Cut at 16 tokens; the batch is two rows, and the same in every step.
    assert [len(row["input_ids"]) for row in rows] == [16, 5] * 3
    assert batch["input_ids"].shape == (2, 16)
    assert batch["attention_mask"].sum() == 21
    assert (batch["labels"] == data.IGNORED).sum() == 11


@pytest.mark.usefixtures("tokenizer")
@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("rows.jsonl", "{", "not one JSON object a line"),
        ("rows.jsonl", '{"label": 1}', "holds no text"),
        ("rows.txt", "\n\n", "holds no text"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_files_without_texts_are_refused(
    name: str, content: str | None, match: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_text(content)

    with pytest.raises(InputError, match=match):
        data.rows_of(task(data=str(file)), 128)


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"quantization": "nf4"},
        {"method": "dora"},
        {"method": "full"},
        {"trainer": "transformers"},
    ],
    ids=str,
)
def test_what_was_tuned_is_saved_loaded_and_answers(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    asked = task(recipe, generate=4, folder=str(tmp_path))
    events = events_of(asked, tmp_path)

    assert labels(events)[-1] == "generate"
    (answer,) = (event for event in events if event["event"] == "answer")
    assert answer["problem"] == ""
    assert answer["same_answer"]
    assert answer["new_tokens"] == 4
    assert answer["saved_bytes"] > 0


def test_what_cannot_be_loaded_is_told_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("no such adapter")

    monkeypatch.setattr("peft.PeftModel.from_pretrained", fail)
    events = events_of(task(generate=4, folder=str(tmp_path)), tmp_path)

    (answer,) = (event for event in events if event["event"] == "answer")
    assert answer["problem"] == "ValueError: no such adapter"
    assert "2.optimizer" in labels(events)
