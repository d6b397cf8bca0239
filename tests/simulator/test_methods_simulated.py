"""Methods over meta tensors: what a layer keeps, what a fine-tune holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from event_logs import live_bytes
from torch import nn

from memplan import methods, quantizations, simulator
from memplan.allocator import AllocatorSettings
from memplan.architecture import Architecture, Linear
from memplan.footprint import Footprint
from memplan.gpu import find_gpu
from memplan.inspector import inspect
from memplan.model_source import ModelSource
from memplan.recipe import Recipe
from memplan.simulator.events import EventLog
from memplan.simulator.operators import rule_of
from memplan.simulator.operators.plain import PLAIN
from memplan.simulator.replay import replay
from memplan.simulator.reroute import Reroute
from memplan.simulator.trace import Tracer

A100 = find_gpu("A100 80GB")

LIBRARY_WORKSPACE = 2**20
"""Bytes from which a block is a library's, which stays for life."""

WITH_FORMULA = [
    *("lora", "rslora", "lora-plus", "lora-fa", "dora", "adalora", "adaq-lora", "vera"),
    *("qa-lora", "q-bara", "qa-hira", "ir-qlora", "houlsby", "relora"),
]


class OneLayer(nn.Module):
    """A model of a single linear layer, as PEFT takes one."""

    prepare_inputs_for_generation = None

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.config = Config()


class Config(dict[str, Any]):
    """The configuration of a model whose hidden states the layer gives."""

    hidden_size = 320

    def get_text_config(self) -> Config:
        return self


def kept_bytes(recipe: Recipe, rank_dtype: torch.dtype) -> int:
    """New bytes that an adapted layer of (128, 320) holds until its backward."""
    layer = nn.Linear(128, 320, bias=False, device="meta", dtype=rank_dtype)
    model = OneLayer(layer)
    scheme = quantizations.find(recipe.quantization)
    if scheme.loading_flag is not None:
        model.layer = scheme.quantized(layer, recipe)
        setattr(model, scheme.loading_flag, True)
    log = EventLog()
    log.begin("1.forward")
    tracer = Tracer(A100, log, padded=False)
    x = torch.empty(2, 24, 128, dtype=rank_dtype, device="meta", requires_grad=True)
    with Reroute(tracer, recipe).installed():
        adapted = methods.find(recipe.method).apply(model, recipe, ("layer",)).train()
        for tensor in (x, *adapted.parameters(), *adapted.buffers()):
            tracer.hold(tensor, log.allocate(0, "held"))
        with tracer:
            # Others read x as well, so that it is there in any case.
            read = x * 1
            before = live_bytes(log)
            out = adapted.get_submodule("base_model.model.layer")(read)
            after = live_bytes(log)
    workspaces = sum(
        size
        for size, category in zip(log.sizes, log.categories, strict=True)
        if category == "workspace" and size >= LIBRARY_WORKSPACE
    )
    return after - before - out.untyped_storage().nbytes() - workspaces


@pytest.mark.parametrize("quantization", ["none", "nf4-double"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITH_FORMULA)
def test_a_layer_keeps_what_the_formula_says(
    name: str, dtype: torch.dtype, dropout: float, quantization: str
) -> None:
    recipe = Recipe(
        method=name, rank=8, dropout=dropout, quantization=quantization, alpha=8
    )
    linear = Linear(
        path="layer", in_features=128, out_features=320, bias=False, kind="mlp"
    )
    flow = methods.Flow(
        tokens=48, input_bytes=dtype.itemsize, adapter_bytes=4, dropout=dropout
    )

    said = methods.find(name).saved_bytes(
        linear, 8, flow, methods.options_at(recipe, "layer")
    )

    if said is None:
        assert (name, dropout) == ("dora", 0.1)
    else:
        assert kept_bytes(recipe, dtype) == said


@pytest.mark.parametrize("name", ["qa-lora", "q-bara", "qa-hira"])
def test_the_published_pooling_keeps_an_input_of_its_own(name: str) -> None:
    """48 tokens of 128 numbers in float32, where the input must be cast."""
    recipes = [
        Recipe(method=name, rank=8, method_options={"pooling": pooling})
        for pooling in ("mean", "avg-pool")
    ]

    mean, published = (kept_bytes(recipe, torch.bfloat16) for recipe in recipes)

    assert published == mean + 48 * 128 * 4


def tiny(num_layers: int) -> Architecture:
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    return inspect(ModelSource(name="tiny/llama", origin="file", config=config))


@pytest.fixture(scope="module")
def shallow() -> Architecture:
    return tiny(2)


@pytest.fixture(scope="module")
def deep() -> Architecture:
    """Layers that repeat often enough for few to stand for the others."""
    return tiny(12)


def small(**keys: Any) -> Recipe:
    return Recipe(**{"rank": 8, "batch_size": 2, "sequence_length": 32} | keys)


SIMULATED = [
    *({"method": name} for name in WITH_FORMULA),
    {"method": "peft", "method_options": {"peft_type": "HIRA"}},
    {"method": "peft", "method_options": {"peft_type": "OFT"}},
    {"method": "peft", "method_options": {"peft_type": "RANDLORA"}},
    {"method": "ir-qlora", "quantization": "nf4-icq"},
    {"method": "adaq-lora", "method_options": {"prune_physically": True}},
    {"method": "qa-lora", "method_options": {"pooling": "avg-pool"}},
]


@pytest.mark.parametrize("keys", SIMULATED, ids=str)
def test_every_operator_of_a_method_is_known(
    shallow: Architecture, keys: dict[str, Any]
) -> None:
    recipe = small(**{"quantization": "nf4-double"} | keys)

    traced = simulator.trace(shallow, recipe, A100)

    names = {operator.name(): operator for operator in traced.operators}
    assert {n for n, op in names.items() if n not in PLAIN and not rule_of(op)} == set()


SLOW = ("lora-fa", "vera", "ir-qlora", "houlsby", "relora", "adalora")


@pytest.mark.parametrize(
    "name", ["q-bara", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_the_log_equals_that_of_the_whole_model(deep: Architecture, name: str) -> None:
    recipe = small(method=name, checkpointing="full", dropout=0.1)

    whole = simulator.trace(deep, recipe, A100, whole=True)
    short = simulator.trace(deep, recipe, A100)

    settings = AllocatorSettings()
    moments = replay(whole.log, settings, None).moments
    assert replay(short.log, settings, None).moments == moments
    assert short.trainable_parameters == whole.trainable_parameters


def allocated(footprint: Footprint, label: str) -> int:
    return next(m.allocated_bytes for m in footprint.moments if m.label == label)


def test_a_restart_s_merge_is_a_moment(shallow: Architecture) -> None:
    """Beyond what stays: B A and that times s, in float32, of the largest layer."""
    footprint = simulator.simulate(shallow, small(method="relora"))

    rest = next(m for m in footprint.moments if m.label == "2.optimizer")
    merge_bytes = allocated(footprint, "restart") - rest.end_allocated_bytes
    assert merge_bytes == pytest.approx(2 * 4 * 256 * 384, rel=0.35)


def test_pruning_releases_parameters_gradients_moments_and_importance(
    shallow: Architecture,
) -> None:
    """Half of the triplets: half of 4 + 8 + 12 bytes a trained number."""
    recipe = small(
        method="adaq-lora",
        method_options={"prune_physically": True, "target_rank": 8},
        rank=16,
    )
    run = simulator.run(shallow, recipe)
    moments = {m.label: m for m in run.footprint.moments}

    released = (
        moments["2.optimizer"].end_allocated_bytes
        - moments["3.optimizer"].end_allocated_bytes
    )

    half = run.trainable_parameters // 2
    assert released == pytest.approx(half * (4 + 8 + 12), rel=0.02)


def test_masking_alone_releases_nothing(shallow: Architecture) -> None:
    plain = simulator.simulate(shallow, small(method="lora", rank=16))
    masked = simulator.simulate(shallow, small(method="adaq-lora", rank=16))

    assert allocated(masked, "2.backward") > allocated(plain, "2.backward")


def test_the_official_forward_keeps_dense_weights(shallow: Architecture) -> None:
    """Every quantised weight in 16 bits, beside what both hold."""
    peaks = [
        allocated(
            simulator.simulate(
                shallow,
                small(
                    method="ir-qlora",
                    quantization="nf4-icq",
                    method_options={"forward": forward},
                ),
            ),
            "2.forward",
        )
        for forward in ("recomputed", "official")
    ]

    weights = sum(
        linear.num_weights
        for _, linear in shallow.all_linears()
        if linear.kind != "head"
    )
    assert peaks[1] - peaks[0] == pytest.approx(2 * weights, rel=0.1)
