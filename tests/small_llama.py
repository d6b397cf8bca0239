"""A small model whose tapes take no time to trace, and its config file."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from memplan.architecture import Architecture
from memplan.catalog import inspect

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lasts as long as the tests do."""
    return tempfile.TemporaryDirectory()


@functools.cache
def config_file() -> str:
    """The path of the model's config.json."""
    file = Path(folder().name) / "config.json"
    file.write_text(json.dumps(CONFIG))
    return str(file)


@functools.cache
def architecture() -> Architecture:
    """What the model is made of."""
    return inspect(config_file())
