"""Small models whose fine-tunes are measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memplan.profiler import child
from memplan.profiler.task import Journal, Task, read_events
from memplan.recipe import Recipe

torch.set_num_threads(1)

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def task(recipe: Mapping[str, Any] | None = None, **fields: Any) -> Task:
    keys = {"rank": 4, "batch_size": 2, "sequence_length": 16} | dict(recipe or {})
    given = {"model": "small", "config": LLAMA, "device": "cpu", "steps": 2}
    return Task(recipe=Recipe(**keys), **given | fields)


def events_of(asked: Task, folder: Path) -> list[Mapping[str, Any]]:
    """What the journal holds when a task was run in this process."""
    file = folder / "journal.jsonl"
    child.run(asked, Journal(file))
    return list(read_events(file))


def labels(events: list[Mapping[str, Any]]) -> list[str]:
    return [event["label"] for event in events if event["event"] == "moment"]
