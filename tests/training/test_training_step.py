"""Steps that run for real: the loss falls, and state is what it is said to be."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import CPU, adapted, architecture, loop_of, tiny_recipe
from torch import nn

from memplan import optimizers
from memplan.recipe import Recipe
from memplan.training.batch import make_batch
from memplan.training.loss import read_loss, run_forward
from memplan.training.model import trained_parameters
from memplan.training.step import Loop

STEPS = 4

LEARNING_RATES = {"sgd": 0.5, "sgd-momentum": 0.3, "lion-8bit": 3e-3}
"""What makes a tiny model learn within a few steps; 0.01 for all others."""

TRAINED = [
    {"family": "llama", "method": "full", "accumulation": 2},
    {
        "family": "llama",
        "method": "lora",
        "quantization": "nf4",
        "checkpointing": "full",
        "reentrant": True,
        "optimizer": "adamw-8bit",
        "max_grad_norm": 0.3,
        "rank": 64,
    },
    {
        "family": "llama",
        "method": "dora",
        "quantization": "nf4-double",
        "checkpointing": "full",
        "optimizer": "paged-adamw-8bit",
        "dropout": 0.1,
    },
    {
        "family": "llama",
        "method": "lora",
        "quantization": "int8",
        "checkpointing": "full",
        "every_n_layers": 2,
        "optimizer": "sgd",
        "targets": "attention",
    },
    {
        "family": "qwen2",
        "method": "full",
        "checkpointing": "full",
        "optimizer": "adafactor",
        "max_grad_norm": 1.0,
        "padded": True,
    },
    {
        "family": "qwen2",
        "method": "rslora",
        "quantization": "fp4",
        "optimizer": "adamw-fused",
        "autocast": "bfloat16",
        "keep_outputs": "step",
    },
    {
        "family": "qwen2",
        "method": "lora",
        "checkpointing": "full",
        "offload": True,
        "optimizer": "sgd-momentum",
        "adapter_dtype": "bfloat16",
        "input_casts": False,
    },
    {
        "family": "gpt2",
        "method": "lora",
        "quantization": "nf4",
        "optimizer": "lion-8bit",
        "rank": 64,
        "trained_modules": ("wpe",),
    },
    {
        "family": "gpt2",
        "method": "full",
        "dtype": "float32",
        "autocast": "bfloat16",
        "checkpointing": "full",
        "every_n_layers": 2,
        "optimizer": "adamw-loop",
        "keep_outputs": "none",
    },
    {
        "family": "gpt_neox",
        "method": "dora",
        "checkpointing": "full",
        "reentrant": True,
        "optimizer": "adamw",
        "targets": "mlp",
    },
    {
        "family": "gpt_neox",
        "method": "rslora",
        "quantization": "fp4-double",
        "checkpointing": "full",
        "offload": True,
        "optimizer": "paged-adamw-32bit",
        "accumulation": 2,
    },
    {
        "family": "gemma2",
        "trainer": "trl",
        "method": "lora",
        "quantization": "nf4",
        "optimizer": "adamw-fused",
    },
    {
        "family": "gemma2",
        "method": "full",
        "optimizer": "adamw-8bit",
        "checkpointing": "full",
        "offload": True,
        "reentrant": True,
    },
    {
        "family": "phi",
        "trainer": "transformers",
        "method": "lora",
        "quantization": "int8",
        "autocast": "bfloat16",
        "optimizer": "paged-lion-8bit",
    },
    {
        "family": "mixtral",
        "method": "lora",
        "quantization": "nf4",
        "targets": "attention",
        "attention": "eager",
    },
]
"""Every method, quantisation, optimizer and kind of checkpointing, and most pairs of
them; DoRA on int8 rows does not run on CPUs (PEFT's dequantize_module_weight drops the
scales there)."""


def name_of(keys: dict[str, Any]) -> str:
    return "-".join(str(value) for value in keys.values())


@pytest.mark.parametrize("case", TRAINED, ids=name_of)
def test_the_loss_falls_and_state_is_as_said(case: dict[str, Any]) -> None:
    family, keys = case["family"], {k: v for k, v in case.items() if k != "family"}
    recipe = tiny_recipe(**keys)
    model = adapted(family, **keys)
    loop = loop_of(family, model, **keys)
    reached = reached_by_gradients(model)

    before = loss_of(family, model, recipe)
    for number in range(1, STEPS + 1):
        run_step(loop, number, recipe)
    after = loss_of(family, model, recipe)

    assert after < before - 0.1
    assert reached == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(parameter.grad is None for parameter in model.parameters())
    check_state(loop.optimizer, recipe, trained_parameters(model))


def run_step(loop: Loop, number: int, recipe: Recipe) -> None:
    """One step on the same tokens each time, at the rate that the test sets."""
    torch.manual_seed(1)
    rate = LEARNING_RATES.get(recipe.optimizer.removeprefix("paged-"), 1e-2)
    for group in loop.optimizer.param_groups:
        group["lr"] = rate
    loop.run_step(number, recipe.accumulation)


def loss_of(family: str, model: nn.Module, recipe: Recipe) -> float:
    """The loss of the first micro-batch, as every step sees it."""
    torch.manual_seed(1)
    batch = make_batch(recipe, architecture(family).vocab_size, CPU)
    with torch.no_grad():
        _, loss = read_loss(run_forward(model, batch, recipe), recipe)
    return float(loss)


def reached_by_gradients(model: nn.Module) -> set[str]:
    """The names of parameters that get a gradient that is not all zero."""
    reached: set[str] = set()

    def note(name: str, parameter: nn.Parameter) -> None:
        parameter.register_post_accumulate_grad_hook(
            lambda p: reached.add(name) if p.grad.any() else None
        )

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            note(name, parameter)
    return reached


def check_state(
    optimizer: torch.optim.Optimizer, recipe: Recipe, parameters: list[nn.Parameter]
) -> None:
    """Nothing is paged on a CPU; step counts are on the card where AdamW is fused."""
    scheme = optimizers.find(recipe.optimizer)
    shared = {"qmap1", "qmap2"}
    if recipe.optimizer != "adamw-fused":
        shared.add("step")
    for parameter in parameters:
        kept = [
            value.nbytes
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor) and name not in shared
        ]
        shape = tuple(parameter.shape)
        said = scheme.state_bytes(shape, parameter.element_size())
        assert sum(kept) == sum(said) + scheme.paged_bytes(shape)


def test_all_of_them_are_covered() -> None:
    def values(key: str) -> set[Any]:
        return {getattr(tiny_recipe(**without_family(case)), key) for case in TRAINED}

    assert values("method") == {"full", "lora", "rslora", "dora"}
    assert values("quantization") == {
        *("none", "nf4", "nf4-double", "fp4", "fp4-double", "int8"),
    }
    assert values("optimizer") == {
        *("adamw", "adamw-fused", "adamw-loop", "sgd", "sgd-momentum", "adafactor"),
        *("adamw-8bit", "lion-8bit", "paged-adamw-8bit", "paged-adamw-32bit"),
        "paged-lion-8bit",
    }
    assert values("trainer") == {"plain", "transformers", "trl"}
    for key in ("offload", "reentrant", "padded", "input_casts"):
        assert values(key) == {True, False}


def without_family(case: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in case.items() if key != "family"}


@dataclasses.dataclass
class Watch:
    """What a loop held, and did, in its phases."""

    labels: list[str] = dataclasses.field(default_factory=list)
    gradients: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Gradients as the optimizer sees them in the first step."""


def watched_step(family: str, *, seed: int = 1, **keys: Any) -> Watch:
    """One step of a model; its gradients and the phases that it announced."""
    model, watch = adapted(family, **keys), Watch()
    recipe = tiny_recipe(**keys)

    @contextlib.contextmanager
    def phase(label: str) -> Iterator[None]:
        watch.labels.append(label)
        if label == "1.optimizer":
            watch.gradients = {
                name: parameter.grad.clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        yield

    loop = Loop(model, recipe, architecture(family).vocab_size, phase)
    torch.manual_seed(seed)
    loop.run_step(1, recipe.accumulation)
    return watch


def norm_of(gradients: dict[str, torch.Tensor]) -> float:
    parts = [gradient.float().norm() for gradient in gradients.values()]
    return float(torch.stack(parts).norm())


def test_phases_of_a_step_with_accumulation_and_clipping() -> None:
    watch = watched_step("llama", accumulation=2, max_grad_norm=1.0)

    assert watch.labels == [
        *("1.forward", "1.backward", "1.forward", "1.backward"),
        *("1.clip", "1.optimizer"),
    ]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize(
    "kind",
    [{}, {"reentrant": True}, {"every_n_layers": 2}, {"offload": True}],
    ids=str,
)
def test_checkpointing_changes_no_gradient(method: str, kind: dict[str, Any]) -> None:
    keys = {"method": method, "dtype": "float32"}

    plain = watched_step("llama", **keys).gradients
    other = watched_step("llama", checkpointing="full", **keys, **kind).gradients

    assert plain.keys() == other.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient)


def test_accumulated_gradients_are_the_mean_of_the_micro_batches() -> None:
    """Both micro-batches draw their tokens from the one stream of random numbers."""
    keys = {"method": "full", "dtype": "float32"}

    one = watched_step("llama", **keys, accumulation=2).gradients
    whole = watched_step("llama", **keys, batch_size=4).gradients

    assert one.keys() == whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(one[name], gradient)


def test_gradients_are_clipped_to_the_norm() -> None:
    free = watched_step("llama", dtype="float32").gradients
    clipped = watched_step("llama", dtype="float32", max_grad_norm=1e-3).gradients

    assert norm_of(free) > 1e-2
    assert norm_of(clipped) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "forwards"),
    [
        ({}, [1, 1]),
        ({"checkpointing": "full"}, [2, 2]),
        ({"checkpointing": "full", "reentrant": True}, [2, 2]),
        ({"checkpointing": "full", "every_n_layers": 2}, [2, 1]),
        ({"checkpointing": "full", "offload": True}, [2, 2]),
    ],
    ids=str,
)
def test_checkpointed_blocks_run_twice(
    kind: dict[str, Any], forwards: list[int]
) -> None:
    model: Any = adapted("llama", **kind)
    runs = [0, 0]

    def count(index: int) -> None:
        norm = model.get_submodule(f"base_model.model.model.layers.{index}")
        norm.input_layernorm.register_forward_pre_hook(
            lambda module, args: runs.__setitem__(index, runs[index] + 1)
        )

    count(0)
    count(1)
    loop_of("llama", model, **kind).run_step(1, 1)

    assert runs == forwards


@pytest.mark.parametrize(
    ("keep_outputs", "in_backward", "after_step", "in_next_forward"),
    [
        ("none", False, False, False),
        ("backward", True, False, False),
        ("step", True, True, True),
    ],
)
def test_outputs_live_as_long_as_the_recipe_says(
    keep_outputs: str, in_backward: bool, after_step: bool, in_next_forward: bool
) -> None:
    """Whether the logits of the first step are alive at three later moments."""
    model = adapted("llama", keep_outputs=keep_outputs)
    logits: list[weakref.ref[torch.Tensor]] = []
    alive: dict[str, bool] = {}

    def look(moment: str) -> None:
        if logits:
            alive.setdefault(moment, logits[0]() is not None)

    model.register_forward_pre_hook(lambda module, args: look("next forward"))
    model.register_forward_hook(
        lambda module, args, output: logits.append(weakref.ref(output.logits))
    )
    trained_parameters(model)[0].register_hook(lambda grad: look("backward"))
    loop = loop_of("llama", model, keep_outputs=keep_outputs)
    loop.run_step(1, 1)
    look("step")
    loop.run_step(2, 1)

    assert alive == {
        "backward": in_backward,
        "step": after_step,
        "next forward": in_next_forward,
    }


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_autocast_is_on_in_forward_and_off_in_backward(autocast: str) -> None:
    model = adapted("llama", autocast=autocast)
    states: dict[str, bool] = {}

    def note(moment: str) -> None:
        states[moment] = torch.is_autocast_enabled("cpu")

    model.register_forward_pre_hook(lambda module, args: note("forward"))
    trained_parameters(model)[0].register_hook(lambda grad: note("backward"))
    loop_of("llama", model, autocast=autocast).run_step(1, 1)

    assert states == {"forward": autocast != "none", "backward": False}
