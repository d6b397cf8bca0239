"""Small models of several families, built as the simulator builds them, with values."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from memplan.architecture import Architecture
from memplan.inspector import inspect
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.training import model as training_model
from memplan.training.step import Loop, silent
from memplan.training.values import materialize

CPU = torch.device("cpu")

# For models this small, threads cost more time than they save.
torch.set_num_threads(1)

_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
_GPT2_SHAPE = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SHAPE | {"num_key_value_heads": 2},
    "qwen2": _SHAPE | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gpt2": _GPT2_SHAPE,
    "gpt_neox": _SHAPE,
    "gemma2": _SHAPE | {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "phi": _SHAPE,
    "gpt_bigcode": _GPT2_SHAPE,
    "mixtral": _SHAPE | {"num_key_value_heads": 2, "num_local_experts": 4},
}
"""Grouped heads; biases and a tied head; Conv1D; biases and a head of another name;
soft caps and two kinds of attention; biases everywhere; weights that a parent module
initialises; fused experts."""


@functools.cache
def architecture(family: str) -> Architecture:
    config = CONFIGS[family] | {"model_type": family}
    return inspect(ModelSource(name=f"tiny/{family}", origin="file", config=config))


def built(family: str, **keys: Any) -> nn.Module:
    """The model with weights, neither prepared nor adapted."""
    torch.manual_seed(0)
    recipe = tiny_recipe(**keys)
    return materialize(training_model.build(architecture(family), recipe), recipe, CPU)


def adapted(family: str, **keys: Any) -> nn.Module:
    """The model with weights, ready to train."""
    recipe = tiny_recipe(**keys)
    model = built(family, **keys)
    training_model.prepare(model, recipe)
    return training_model.adapt(model, architecture(family), recipe)


def loop_of(family: str, model: nn.Module, **keys: Any) -> Loop:
    vocab_size = architecture(family).vocab_size
    return Loop(model, tiny_recipe(**keys), vocab_size, silent)


def tiny_recipe(**keys: Any) -> Recipe:
    return Recipe(**{"rank": 4, "batch_size": 2, "sequence_length": 16} | keys)
