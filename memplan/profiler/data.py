"""The batches that a measured fine-tune trains on: random tokens, or a file's texts.

Texts are cut to the recipe's sequence length, and every step trains on the longest
batch of the file, since that is the one whose memory decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from memplan.errors import InputError
from memplan.profiler.task import Task
from memplan.training.batch import make_batch

IGNORED = -100
"""The label of tokens that are not scored (torch's `ignore_index`)."""

PADDING = 0
"""The token under what the mask hides."""

FIELD = "--data"

TEXT_KEYS = ("text", "content", "completion")
"""The keys that hold a row's text, where it has no messages."""

Row = dict[str, list[int]]


def rows_of(task: Task, vocab_size: int) -> list[Row]:
    """The rows of every step, in order: tokens, labels and the mask of each."""
    recipe = task.recipe
    num_batches = max(task.total_steps, 1) * recipe.accumulation
    if not task.data:
        return [row for _ in range(num_batches) for row in _random(task, vocab_size)]
    texts = sorted(_tokenized(task), key=len, reverse=True)
    longest = [texts[index % len(texts)] for index in range(recipe.batch_size)]
    batch = [_row(tokens[: recipe.sequence_length]) for tokens in longest]
    return batch * num_batches


def batches(
    task: Task, vocab_size: int, device: torch.device
) -> Iterator[dict[str, torch.Tensor]]:
    """What a bare loop is given, batch after batch, on the device."""
    recipe = task.recipe
    if not task.data:
        while True:
            yield make_batch(recipe, vocab_size, device)
    rows = rows_of(task, vocab_size)[: recipe.batch_size]
    while True:
        yield {name: tensor.to(device) for name, tensor in collate(rows).items()}


def first_sequences(task: Task, count: int) -> list[list[int]]:
    """Tokens of the first texts of the task's file, cut to the sequence length."""
    texts = _tokenized(task)[:count]
    return [tokens[: task.recipe.sequence_length] for tokens in texts]


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows as a batch, each (B, T) of int64, padded to the longest on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": PADDING, "labels": IGNORED, "attention_mask": 0}
    return {
        name: torch.tensor(
            [row[name] + [value] * (length - len(row[name])) for row in rows]
        )
        for name, value in padding.items()
    }


def _random(task: Task, vocab_size: int) -> list[Row]:
    """A batch of random rows; padding hides the first quarter of the first."""
    recipe = task.recipe
    shape = (recipe.batch_size, recipe.sequence_length)
    rows = [_row(tokens) for tokens in torch.randint(0, vocab_size, shape).tolist()]
    if recipe.padded:
        hidden = recipe.sequence_length // 4
        rows[0]["attention_mask"][:hidden] = [0] * hidden
    return rows


def _row(tokens: list[int]) -> Row:
    return {
        "input_ids": tokens,
        "labels": list(tokens),
        "attention_mask": [1] * len(tokens),
    }


def _tokenized(task: Task) -> list[list[int]]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(task.model)
    except (OSError, ValueError) as error:
        raise InputError(
            FIELD,
            task.data,
            f"needs the tokenizer of {task.model}, which is not to be had",
            "give a model with its tokenizer, or leave the data out",
        ) from error
    texts = [_as_text(row, tokenizer) for row in _read(task.data)]
    tokenized = [list(tokenizer(text)["input_ids"]) for text in texts if text.strip()]
    if not any(tokenized):
        raise InputError(FIELD, task.data, "holds no text", "give a file with texts")
    return [tokens for tokens in tokenized if tokens]


def _read(file: str) -> list[Any]:
    """The rows of a JSONL file, or the lines of a text."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            FIELD, file, f"cannot be read ({reason})", "give a JSONL or text file"
        ) from error
    if not file.endswith((".jsonl", ".json")):
        return lines
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        problem = f"is not one JSON object a line ({error})"
        raise InputError(FIELD, file, problem, "give a JSONL file") from error


def _as_text(row: Any, tokenizer: Any) -> str:
    """A row's text; messages as the model's chat template writes them."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    found = [row[key] for key in TEXT_KEYS if isinstance(row, dict) and key in row]
    if not found:
        keys = ", ".join(("messages", *TEXT_KEYS))
        raise InputError(FIELD, row, "holds no text", f"use one of the keys {keys}")
    return f"{row.get('prompt', '')}{found[0]}"
