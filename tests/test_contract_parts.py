"""Every method, quantisation and optimizer that the folders hold keeps its contract."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import QuantState
from torch import nn

from memplan import losses, methods, optimizers, quantizations, registry
from memplan.architecture import Architecture, Linear
from memplan.catalog import inspect
from memplan.errors import UnknownNameError
from memplan.fields import Kind
from memplan.recipe import Recipe
from memplan.training.wrapped import plain_tensors

FOLDERS = {
    "methods": methods.Method,
    "quantizations": quantizations.Quantization,
    "optimizers": optimizers.Optimizer,
    "losses": losses.Loss,
}

PARTS = [(folder, name) for folder in FOLDERS for name in registry.names(folder)]
METHODS = registry.names("methods")
QUANTIZATIONS = registry.names("quantizations")
OPTIMIZERS = registry.names("optimizers")

ADAPTER_METHODS = [name for name in METHODS if methods.find(name).uses]
BY_LAYER = [name for name in ADAPTER_METHODS if name not in ("houlsby", "peft")]
"""Methods that adapt every layer, and need no options."""


@pytest.mark.parametrize(("folder", "name"), PARTS)
def test_part_is_of_its_folder_s_class_and_says_what_it_is(
    folder: str, name: str
) -> None:
    part = registry.load(folder, name, "field")

    assert isinstance(part, FOLDERS[folder])
    assert part.summary.strip() == part.summary != ""
    assert "\n" not in part.summary
    assert not part.summary.endswith(".")
    assert type(part).__doc__


@pytest.mark.parametrize("folder", FOLDERS)
def test_summaries_tell_parts_apart(folder: str) -> None:
    names = registry.names(folder)

    assert len({registry.load(folder, n, "field").summary for n in names}) == len(names)


@pytest.mark.parametrize(
    ("find", "field"),
    [
        (methods.find, "method"),
        (quantizations.find, "quantization"),
        (optimizers.find, "optimizer"),
        (losses.find, "loss"),
    ],
)
def test_unknown_part_is_refused_by_its_field(find: Any, field: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{field}: 'nothing' is unknown"):
        find("nothing")


@pytest.fixture(scope="module")
def llama() -> Architecture:
    return inspect("meta-llama/Llama-2-7b-hf")


def adapted(architecture: Architecture) -> Iterator[Linear]:
    """The linear layers that `all-linear` means: all but the head."""
    return (linear for _, linear in architecture.all_linears() if linear.kind != "head")


@pytest.mark.parametrize(
    ("name", "rank", "trainable"),
    [
        ("lora", 8, 19_988_480),
        ("lora", 64, 159_907_840),
        ("rslora", 16, 39_976_960),
        ("dora", 8, 21_348_352),
        ("dora", 64, 161_267_712),
    ],
)
def test_trainable_parameters_of_llama(
    llama: Architecture, name: str, rank: int, trainable: int
) -> None:
    """By hand: 32 layers of r (4 (4096 + 4096) + 3 (4096 + 11008)).

    DoRA has the 42,496 outputs of each layer more.
    """
    method = methods.find(name)

    counted = sum(method.trainable_parameters(one, rank) for one in adapted(llama))

    assert counted == trainable


@pytest.mark.parametrize("name", METHODS)
def test_method_s_options_and_keys_are_known(name: str) -> None:
    method = methods.find(name)

    assert method.uses <= methods.ADAPTER_KEYS | {"lambda_pattern"}
    assert all(isinstance(kind, Kind) for kind in method.options.values())
    assert isinstance(method.carries_quantized, bool)


def tiny_model() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }


def described(path: str, module: nn.Linear) -> Linear:
    return Linear(
        path=path,
        in_features=module.in_features,
        out_features=module.out_features,
        bias=module.bias is not None,
        kind="other",
    )


@pytest.mark.parametrize("name", BY_LAYER)
def test_method_trains_what_it_says(name: str) -> None:
    model, method = tiny_model(), methods.find(name)
    layers = linear_layers(model)
    recipe = Recipe(method=name, rank=4)
    said = sum(
        method.trainable_parameters(described(path, module), recipe.rank)
        for path, module in layers.items()
    )

    applied = method.apply(model, recipe, tuple(layers))

    trained = [p.numel() for p in applied.parameters() if p.requires_grad]
    assert sum(trained) == said


def test_full_fine_tuning_trains_every_parameter() -> None:
    model = tiny_model().requires_grad_(False)
    linear = Linear(path="x", in_features=3, out_features=5, bias=True, kind="other")

    applied = methods.find("full").apply(model, Recipe(method="full"), ())

    assert all(parameter.requires_grad for parameter in applied.parameters())
    assert methods.find("full").trainable_parameters(linear, 16) == 3 * 5 + 5


WIDE = 4096 * 11008


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("none", ()),
        ("int8", (WIDE, 4 * 11008)),
        # Two weights a byte, a float32 absmax per 64 of them, 16 codes in float32.
        ("nf4", (WIDE // 2, 4 * WIDE // 64, 64)),
        ("fp4", (WIDE // 2, 4 * WIDE // 64, 64)),
        # The absmax in 8 bits, their mean, an absmax per 256 of them, 256 codes.
        (
            "nf4-icq",
            (
                *(WIDE // 2, WIDE // 64, 64, 4, 4 * WIDE // 64 // 256, 1024),
                # A shift in 8 bits per 64 weights, an absmax per 256 of them.
                *(WIDE // 64, 4 * WIDE // 64 // 256),
            ),
        ),
        ("nf4-double", (WIDE // 2, WIDE // 64, 64, 4, 4 * WIDE // 64 // 256, 1024)),
        ("fp4-double", (WIDE // 2, WIDE // 64, 64, 4, 4 * WIDE // 64 // 256, 1024)),
    ],
)
def test_stored_bytes_of_a_layer(name: str, sizes: tuple[int, ...]) -> None:
    assert quantizations.find(name).stored_bytes(WIDE, 11008) == sizes


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("int8", 6.481), ("nf4", 3.643), ("nf4-double", 3.341)]
)
def test_stored_bytes_of_llama(
    llama: Architecture, name: str, gigabytes: float
) -> None:
    """6,476,005,376 weights of linear layers at 8, 4.5 and 4.127 bits, and scales."""
    scheme = quantizations.find(name)

    stored = sum(
        sum(scheme.stored_bytes(one.num_weights, one.out_features))
        for one in adapted(llama)
    )

    assert stored / 10**9 == pytest.approx(gigabytes, abs=0.0005)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a bitsandbytes weight, state or nested state holds."""
    if isinstance(value, QuantState):
        parts = (value.absmax, value.code, value.offset, value.state2)
        yield from itertools.chain.from_iterable(map(tensors_of, parts))
    elif isinstance(value, torch.Tensor):
        yield value
        yield from tensors_of(getattr(value, "quant_state", None))
        yield from tensors_of(getattr(value, "SCB", None))


def sizes_of(module: nn.Module) -> list[int]:
    held = itertools.chain(tensors_of(module.weight), module.buffers())
    return sorted(plain.nbytes for each in held for plain in plain_tensors(each))


QUANTIZED = [n for n in QUANTIZATIONS if n != "none" and not n.startswith("hqq")]
"""Schemes whose layers have a weight; HQQ's are in test_quantizations_hqq.py."""


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", [(128, 64), (96, 160), (33, 65)])
def test_meta_module_stores_what_the_scheme_says(
    name: str, shape: tuple[int, int]
) -> None:
    in_features, out_features = shape
    scheme = quantizations.find(name)
    linear = nn.Linear(in_features, out_features, device="meta", dtype=torch.bfloat16)

    module = scheme.quantized(linear, Recipe(quantization=name))

    said = scheme.stored_bytes(in_features * out_features, out_features)
    assert sizes_of(module) == sorted(said)
    assert module.bias is not None


@pytest.mark.parametrize("name", ["nf4", "nf4-double", "fp4", "fp4-double"])
def test_real_four_bit_module_stores_what_the_scheme_says(name: str) -> None:
    import bitsandbytes as bnb

    scheme = quantizations.find(name)
    module = bnb.nn.Linear4bit(
        128,
        96,
        quant_type=name.removesuffix("-double"),
        compress_statistics=name.endswith("-double"),
    )

    module = module.to("cpu")

    assert module.weight.quant_state is not None
    assert sizes_of(module) == sorted(scheme.stored_bytes(128 * 96, 96))


def test_real_int8_module_stores_what_the_scheme_says() -> None:
    import bitsandbytes as bnb

    module = bnb.nn.Linear8bitLt(128, 96, has_fp16_weights=False, threshold=6.0)

    module = module.to("cpu")

    said = quantizations.find("int8").stored_bytes(128 * 96, 96)
    assert sizes_of(module) == sorted(said)


SHAPES = [(64,), (4097,), (100, 100), (300, 400), (2, 30, 50)]
"""Below and above the bounds from which states are kept in 8 bits and paged."""


def stepped(name: str, shape: tuple[int, ...], device: str, dtype: Any) -> Any:
    """A parameter's state after the optimizer's first step."""
    parameter = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings(action="ignore"):
        optimizer = optimizers.find(name).build([parameter])
        optimizer.step()
    # LoRA-FA's optimizer keeps state by a parameter's name.
    (state,) = optimizer.state.values() or ({},)
    return state


def kept_bytes(state: dict[str, Any], *, counts_steps: bool) -> int:
    """Bytes of a state's own tensors; qmaps are shared by all parameters."""
    skipped = {"qmap1", "qmap2"} | (set() if counts_steps else {"step"})
    return sum(
        value.nbytes
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key not in skipped
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_real_optimizer_keeps_what_is_said(name: str, shape: tuple[int, ...]) -> None:
    """On a CPU nothing is paged, so what would be is kept as well.

    Only the fused AdamW counts its steps on the card (torch's adam.py, `_init_group`).
    """
    optimizer = optimizers.find(name)

    state = stepped(name, shape, "cpu", torch.float32)

    said = sum(optimizer.state_bytes(shape, 4)) + optimizer.paged_bytes(shape)
    assert kept_bytes(state, counts_steps=name == "adamw-fused") == said


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if "bit" not in n])
def test_real_optimizer_over_bfloat16_keeps_what_is_said(name: str) -> None:
    optimizer = optimizers.find(name)

    state = stepped(name, (100, 100), "cpu", torch.bfloat16)

    said = sum(optimizer.state_bytes((100, 100), 2))
    assert kept_bytes(state, counts_steps=name == "adamw-fused") == said


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meta_optimizer_keeps_what_is_said(name: str, shape: tuple[int, ...]) -> None:
    optimizer = optimizers.find(name)

    state = stepped(name, shape, "meta", torch.float32)

    kept = kept_bytes(state, counts_steps=name == "adamw-fused")
    assert kept == sum(optimizer.state_bytes(shape, 4))


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n.startswith("paged")])
def test_only_large_states_are_paged(name: str) -> None:
    optimizer = optimizers.find(name)
    plain = optimizers.find(name.removeprefix("paged-").replace("adamw-32bit", "adamw"))

    assert optimizer.paged_bytes((99_999,)) == 0
    large = math.prod((300, 400))
    whole = sum(plain.state_bytes((large,), 4))
    assert optimizer.paged_bytes((large,)) > 0
    assert optimizer.paged_bytes((large,)) + sum(
        optimizer.state_bytes((large,), 4)
    ) == (whole)
