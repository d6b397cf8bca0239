"""How many tokens texts have."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transformers import AutoTokenizer

from memplan.errors import InputError


def count(texts: Iterable[str], model: str) -> list[int]:
    """Tokens of each text, special ones included, by the tokenizer of a model.

    `model` is a hub id, a folder or a config.json in one. Raises InputError where there
    is no tokenizer that can be read.
    """
    path = Path(model).expanduser()
    name = str(path.parent if path.is_file() else path if path.is_dir() else model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        problem = f"has no tokenizer that can be read ({' '.join(str(error).split())})"
        raise InputError(
            "--lengths",
            name,
            problem[:300],
            "give token counts instead of texts, or the folder of a model",
        ) from error
    return [len(ids) for ids in tokenizer(list(texts), truncation=False)["input_ids"]]
