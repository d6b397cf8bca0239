"""Whether what was tuned can be used: saved, loaded anew, and asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memplan.profiler.task import Task
from memplan.training import life as training_life

PROMPT_TOKENS = 8
"""Tokens of the prompt that is answered before and after."""

MESSAGE_CHARACTERS = 300
"""How much of an error is told."""


def check_answer(model: nn.Module, task: Task, vocab_size: int) -> dict[str, Any]:
    """What came of saving a tuned model, loading it anew and asking it.

    `same_answer` says whether the loaded one makes the same tokens as the tuned one.
    A failure is told by `problem`, and is no reason to lose what was measured.
    """
    folder = Path(task.folder) / "tuned"
    found: dict[str, Any] = {"new_tokens": task.generate, "problem": ""}
    try:
        before = _answer(model, task, vocab_size)
        training_life.save(model, str(folder))
        found["saved_bytes"] = sum(
            file.stat().st_size for file in folder.rglob("*") if file.is_file()
        )
        after = _answer(_loaded(model, folder), task, vocab_size)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        text = f"{type(error).__name__}: {error}"
        return found | {"problem": text[:MESSAGE_CHARACTERS]}
    found["same_answer"] = bool(torch.equal(before, after))
    if not found["same_answer"]:
        found["problem"] = "what was loaded answers otherwise than what was saved"
    return found


def _loaded(model: Any, folder: Path) -> nn.Module:
    """The saved model: adapters go onto the base below them, which is not read anew."""
    if training_life.unwrapped(model) is model:
        read: Any = type(model)
        loaded: nn.Module = read.from_pretrained(
            folder, dtype=model.dtype, device_map={"": model.device}
        )
        return loaded
    import peft

    base = model.unload()
    adapted: nn.Module = peft.PeftModel.from_pretrained(base, folder)
    return adapted


@torch.no_grad()
def _answer(model: Any, task: Task, vocab_size: int) -> Tensor:
    """The tokens that follow a fixed prompt, each the likeliest."""
    model.eval()
    device = next(model.parameters()).device
    length = min(PROMPT_TOKENS, task.recipe.sequence_length)
    prompt = torch.arange(1, length + 1, device=device)[None] % vocab_size
    tokens: Tensor = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=task.generate,
        min_new_tokens=task.generate,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return tokens[:, length:]
