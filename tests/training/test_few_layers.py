"""Models of which few layers are built: what is there, by which names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from memplan import inspector
from memplan.architecture import Architecture
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.training.few_layers import FewLayers, KeptLayers, whole_modules
from memplan.training.model import build

CONFIG = {
    "model_type": "gemma2",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 32,
}
KEPT = KeptLayers(
    stack="model.layers",
    numbers=(0, 1, 5, 8),
    left_out={2: 0, 3: 1, 4: 0, 6: 0, 7: 1},
)


def architecture(model_type: str) -> Architecture:
    config = CONFIG | {"model_type": model_type}
    return inspector.inspect(ModelSource(name="nine", origin="file", config=config))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """The layers of Llama that are built."""
    layers: list[nn.Module] = []
    original = LlamaDecoderLayer.__init__

    def build_layer(layer: nn.Module, *args: object) -> None:
        layers.append(layer)
        original(layer, *args)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", build_layer)
    return layers


def test_layers_keep_their_numbers() -> None:
    model = build(architecture("gemma2"), Recipe(), KEPT)
    layers = model.get_submodule("model.layers")

    assert isinstance(layers, FewLayers)
    assert [name for name, _ in layers.named_children()] == ["0", "1", "5", "8"]
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 5, 8]
    assert layers[2] is model.get_submodule("model.layers.5")
    assert layers[-1] is layers[1:][2]


def test_what_the_config_lists_by_layer_is_that_of_the_layers() -> None:
    whole = build(architecture("gemma2"), Recipe()).config.layer_types
    few = build(architecture("gemma2"), Recipe(), KEPT).config.layer_types

    assert few == [whole[number] for number in KEPT.numbers]


def test_the_other_layers_are_not_built(built: list[nn.Module]) -> None:
    build(architecture("llama"), Recipe(), KEPT)
    assert len(built) == 9 + len(KEPT.numbers)  # all of them to inspect the model


@pytest.mark.parametrize("error", [AttributeError, None])
def test_a_model_that_needs_its_layers_is_built_whole(
    error: type[Exception] | None,
    built: list[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = LlamaModel.__init__

    def build_and_read(model: LlamaModel, config: object) -> None:
        LlamaDecoderLayer(config, 0)  # another one than those of the stack
        original(model, config)
        if error is not None:
            assert all(layer.mlp for layer in model.layers)

    inspected = architecture("llama")
    monkeypatch.setattr(LlamaModel, "__init__", build_and_read)
    built.clear()
    model = build(inspected, Recipe(), KEPT)

    assert len(built) > 2 * len(KEPT.numbers)
    assert len(list(model.get_submodule("model.layers.8").children())) == 4


def test_whole_modules_are_those_of_the_whole_model() -> None:
    inspected = architecture("llama")
    whole = dict(build(inspected, Recipe()).named_modules())
    few = dict(whole_modules(build(inspected, Recipe(), KEPT)))

    assert few.keys() == whole.keys()
    assert few["model.layers.7.mlp"] is few["model.layers.1.mlp"]


def test_layers_beside_the_stack_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LlamaModel.__init__

    def build_more(model: LlamaModel, config: object) -> None:
        original(model, config)
        model.more = LlamaDecoderLayer(config, 0)

    inspected = architecture("llama")
    monkeypatch.setattr(LlamaModel, "__init__", build_more)
    model = build(inspected, Recipe(), KEPT)

    assert len(list(model.get_submodule("model.more").children())) == 4
    assert len(model.get_submodule("model.layers")) == len(KEPT.numbers)
