"""A built, prepared and adapted model is what a script would have in its hands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import CONFIGS, CPU, adapted, architecture, built, tiny_recipe
from torch import nn

from memplan import methods, quantizations
from memplan.architecture import Architecture, Linear
from memplan.errors import InputError, UnknownNameError
from memplan.inspector import build_config
from memplan.model_source import ModelSource
from memplan.training import model as training_model

PREFIX = "base_model.model."


def loaded(family: str, folder: Path, **kwargs: Any) -> nn.Module:
    """The model as from_pretrained loads it from a checkpoint of its own."""
    made = architecture(family)
    source = ModelSource(name=made.name, origin="file", config=dict(made.config))
    classes = transformers.AutoModelForCausalLM
    classes.from_config(build_config(source)).save_pretrained(folder)
    model: nn.Module = classes.from_pretrained(folder, device_map={"": CPU}, **kwargs)
    return model


def described(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Class, shape and precision of each tensor, and of what it is quantised with."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tuple(_facts(tensor)) for name, tensor in tensors}


def _facts(tensor: Any) -> Iterator[Any]:
    yield from (type(tensor).__name__, tuple(tensor.shape), tensor.dtype)
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield from (tuple(state.shape), state.dtype, state.quant_type, state.blocksize)
        parts = [state.absmax, state.code, state.offset]
        if state.nested:
            parts += [state.state2.absmax, state.state2.code]
        yield from ((tuple(p.shape), p.dtype) for p in parts if p is not None)
    if hasattr(tensor, "SCB"):
        yield from (tuple(tensor.SCB.shape), tensor.SCB.dtype)


def bnb_config(quantization: str, **keys: Any) -> transformers.BitsAndBytesConfig:
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **keys)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.removesuffix("-double"),
        bnb_4bit_use_double_quant=quantization.endswith("-double"),
        bnb_4bit_compute_dtype=torch.bfloat16,
        **keys,
    )


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_built_model_is_what_from_pretrained_loads(
    family: str, dtype: str, tmp_path: Path
) -> None:
    real = loaded(family, tmp_path, dtype=getattr(torch, dtype))

    assert described(built(family, dtype=dtype)) == described(real)


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("llama", "nf4"),
        ("llama", "fp4-double"),
        ("llama", "int8"),
        ("qwen2", "nf4-double"),
        ("gpt2", "nf4-double"),
        ("gpt2", "int8"),
        ("gpt_neox", "nf4"),
        ("gemma2", "fp4"),
        ("phi", "int8"),
        ("gpt_bigcode", "nf4"),
        ("mixtral", "nf4"),
    ],
)
def test_quantised_model_is_what_from_pretrained_loads(
    family: str, quantization: str, tmp_path: Path
) -> None:
    config = bnb_config(quantization)
    real = loaded(family, tmp_path, dtype=torch.bfloat16, quantization_config=config)

    assert described(built(family, quantization=quantization)) == described(real)


@pytest.mark.parametrize(
    "names", [("lm_head", "down_proj"), ("model.layers.0",), ("self_attn", "mlp.up")]
)
def test_unquantised_modules_are_named_as_transformers_takes_them(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    config = bnb_config("nf4", llm_int8_skip_modules=list(names))
    real = loaded("llama", tmp_path, dtype=torch.bfloat16, quantization_config=config)

    model = built("llama", quantization="nf4", unquantized_modules=names)

    assert described(model) == described(real)


@pytest.mark.parametrize("quantization", ["nf4", "nf4-double", "fp4", "int8"])
def test_stored_bytes_are_those_of_real_layers(quantization: str) -> None:
    scheme = quantizations.find(quantization)
    model = built("llama", quantization=quantization)

    for path, linear in architecture("llama").all_linears():
        if linear.kind == "head":
            continue
        weight: Any = model.get_submodule(path).weight
        held = list(_quantised_tensors(weight))
        said = scheme.stored_bytes(linear.num_weights, linear.out_features)
        assert sum(tensor.nbytes for tensor in held) == sum(said), path
        assert held[0].nbytes == said[0]


def _quantised_tensors(weight: Any) -> Iterator[torch.Tensor]:
    yield weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        yield weight.SCB
        return
    yield from (state.absmax, state.code)
    if state.nested:
        yield from (state.offset, state.state2.absmax, state.state2.code)


def adapted_paths(model: nn.Module) -> set[str]:
    return {
        path.removeprefix(PREFIX)
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def linears(made: Architecture, *kinds: str) -> dict[str, Linear]:
    return {path: one for path, one in made.all_linears() if one.kind in kinds}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "phi"])
@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        ("all-linear", ("attention", "mlp")),
        ("attention", ("attention",)),
        ("mlp", ("mlp",)),
    ],
)
def test_targets_by_kind(family: str, targets: str, kinds: tuple[str, ...]) -> None:
    wanted = linears(architecture(family), *kinds)

    assert adapted_paths(adapted(family, targets=targets)) == set(wanted)


@pytest.mark.parametrize("family", CONFIGS)
def test_all_linear_is_what_peft_takes_for_it(family: str) -> None:
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    real = peft.get_peft_model(built(family), config)

    assert adapted_paths(adapted(family)) == adapted_paths(real)


def test_attention_and_mlp_of_llama_are_its_seven_layers() -> None:
    made = architecture("llama")
    attention = training_model.target_modules(made, tiny_recipe(targets="attention"))
    mlp = training_model.target_modules(made, tiny_recipe(targets="mlp"))

    ends = [path.rpartition(".")[2] for path in (*attention, *mlp)]
    assert ends == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]


def test_targets_by_name_are_ends_of_paths() -> None:
    model = adapted("llama", targets=("q_proj", "layers.1.mlp.up_proj"))

    assert adapted_paths(model) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_the_head_is_adapted_by_name() -> None:
    assert adapted_paths(adapted("llama", targets=("lm_head",))) == {"lm_head"}


def test_unknown_target_is_refused_with_near_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"targets: 'q_prok' is unknown.*q_proj"):
        adapted("llama", targets=("q_prok",))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_that_matches_nothing_is_refused(field: str) -> None:
    with pytest.raises(InputError, match=f"{field}: 'qproj' matches no adapted module"):
        adapted("llama", **{field: {"qproj": 2}})


def test_pattern_of_a_module_that_is_not_adapted_is_refused() -> None:
    with pytest.raises(InputError, match="rank_pattern: 'up_proj'"):
        adapted("llama", targets="attention", rank_pattern={"up_proj": 2})


def test_patterns_give_ranks_and_scales() -> None:
    model: Any = adapted(
        "llama", rank_pattern={"layers.1.*q_proj": 2}, alpha_pattern={"q_proj": 6}
    )

    first, second = (
        model.get_submodule(f"{PREFIX}model.layers.{index}.self_attn.q_proj")
        for index in (0, 1)
    )
    assert (first.r["default"], second.r["default"]) == (4, 2)
    assert (first.scaling["default"], second.scaling["default"]) == (6 / 4, 6 / 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize(
    ("method", "quantization"),
    [("lora", "none"), ("rslora", "nf4"), ("dora", "nf4-double"), ("lora", "int8")],
)
def test_trained_parameters_are_those_of_the_method(
    family: str, method: str, quantization: str
) -> None:
    model = adapted(family, method=method, quantization=quantization)

    trained = training_model.trained_parameters(model)
    targets = linears(architecture(family), "attention", "mlp").values()
    said = sum(methods.find(method).trainable_parameters(one, 4) for one in targets)
    assert sum(parameter.numel() for parameter in trained) == said


@pytest.mark.parametrize("family", CONFIGS)
def test_full_fine_tuning_trains_the_whole_architecture(family: str) -> None:
    model = adapted(family, method="full")

    trained = sum(p.numel() for p in training_model.trained_parameters(model))
    assert trained == architecture(family).total_parameters


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model: Any = adapted("llama", method="rslora", rank=16, alpha=8)

    layer = model.get_submodule(f"{PREFIX}model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == 8 / 4


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.float32),
        ({"dtype": "float32"}, torch.float32),
        ({"quantization": "nf4"}, torch.float32),
        ({"quantization": "int8"}, torch.float32),
        ({"adapter_dtype": "bfloat16"}, torch.bfloat16),
        ({"adapter_dtype": "float16"}, torch.float16),
        ({"adapter_dtype": "bfloat16", "quantization": "nf4"}, torch.bfloat16),
        ({"adapter_dtype": "bfloat16", "dtype": "float32"}, torch.bfloat16),
        ({"trainer": "trl"}, torch.float32),
        ({"trainer": "trl", "quantization": "nf4"}, torch.bfloat16),
        ({"trainer": "transformers", "quantization": "nf4"}, torch.float32),
    ],
)
def test_adapters_have_the_recipe_s_precision(
    keys: dict[str, Any], dtype: torch.dtype
) -> None:
    trained = training_model.trained_parameters(adapted("llama", **keys))

    assert {parameter.dtype for parameter in trained} == {dtype}


def test_trl_leaves_magnitudes_of_a_quantised_model_alone() -> None:
    model = adapted("llama", trainer="trl", quantization="nf4", method="dora")

    dtypes = {
        "magnitude" in name: parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


@pytest.mark.parametrize("input_casts", [True, False])
def test_input_casts_are_peft_s_switch(input_casts: bool) -> None:
    """Float32 adapters read a copy of bfloat16 inputs, or refuse them."""
    model: Any = adapted("llama", input_casts=input_casts)
    layer = model.get_submodule(f"{PREFIX}model.layers.0.mlp.up_proj")
    seen = []
    layer.lora_A["default"].register_forward_pre_hook(
        lambda module, args: seen.append(args[0].dtype)
    )

    inputs = torch.ones(1, 64, dtype=torch.bfloat16)
    if input_casts:
        layer(inputs)
    else:
        with pytest.raises(RuntimeError, match="same dtype"):
            layer(inputs)

    assert seen == [torch.float32 if input_casts else torch.bfloat16]


def test_without_input_casts_peft_s_own_helper_finds_nothing_to_do() -> None:
    def switches(model: nn.Module) -> dict[str, bool]:
        return {
            path: module.cast_input_dtype_enabled
            for path, module in model.named_modules()
            if isinstance(module, BaseTunerLayer)
        }

    model = adapted("llama")
    with peft.helpers.disable_input_dtype_casting(model):
        helped = switches(model)

    assert switches(adapted("llama", input_casts=False)) == helped
    assert set(helped.values()) == {False}


@pytest.mark.parametrize(
    ("kbit_prepare", "dtype"), [(True, torch.float32), (False, torch.bfloat16)]
)
def test_kbit_preparation_casts_what_is_not_quantised(
    kbit_prepare: bool, dtype: torch.dtype
) -> None:
    model = adapted("phi", quantization="nf4", kbit_prepare=kbit_prepare)

    frozen = [
        parameter
        for parameter in model.parameters()
        if not parameter.requires_grad and parameter.is_floating_point()
    ]
    assert {parameter.dtype for parameter in frozen} == {dtype}


def test_an_unquantised_model_is_not_prepared() -> None:
    model = adapted("llama", kbit_prepare=True)

    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}


def test_trained_modules_are_copied_and_trained_whole() -> None:
    """128 tokens of 64; the copy keeps the precision of the weights (PEFT)."""
    model: Any = adapted("llama", trained_modules=("lm_head", "embed_tokens"))

    trained = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    assert [p.numel() for p in trained.values() if p.requires_grad] == [128 * 64] * 2
    originals = [n for n, _ in model.named_parameters() if "original_module" in n]
    assert len(originals) == 2


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"trainer": "trl"}, torch.bfloat16),
        ({"trainer": "trl", "dtype": "float32"}, torch.float32),
        ({"quantization": "nf4"}, torch.float32),
        ({"quantization": "nf4", "kbit_prepare": False}, torch.bfloat16),
        ({"quantization": "nf4", "trainer": "trl", "dtype": "float32"}, torch.bfloat16),
    ],
)
def test_trained_modules_stay_in_the_precision_of_their_weights(
    keys: dict[str, Any], dtype: torch.dtype
) -> None:
    """Single after k-bit preparation; TRL halves them beside a quantised model."""
    model = adapted("llama", trained_modules=("lm_head",), **keys)

    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert [parameter.dtype for parameter in trained] == [dtype]


def test_unknown_trained_module_is_refused() -> None:
    with pytest.raises(UnknownNameError, match=r"trained_modules: 'lm_haed'.*lm_head"):
        adapted("llama", trained_modules=("lm_haed",))


def test_quantised_modules_cannot_be_trained() -> None:
    keys = {"quantization": "nf4", "trained_modules": ("down_proj",)}

    with pytest.raises(InputError, match="name it in unquantized_modules"):
        adapted("llama", **keys)
    assert adapted("llama", unquantized_modules=("lm_head", "down_proj"), **keys)


def test_training_a_tied_head_gives_it_a_weight_of_its_own() -> None:
    model: Any = adapted("qwen2", trained_modules=("lm_head",))

    head = model.get_output_embeddings().weight
    assert head is not model.get_input_embeddings().weight
    assert head.requires_grad


def checkpointed_layers(model: nn.Module) -> list[bool]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [
        layer.gradient_checkpointing
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({}, [False, False]),
        ({"checkpointing": "full"}, [True, True]),
        ({"checkpointing": "full", "every_n_layers": 2}, [True, False]),
        ({"checkpointing": "full", "quantization": "nf4"}, [True, True]),
        ({"checkpointing": "full", "method": "full"}, [True, True]),
    ],
)
def test_checkpointed_layers(keys: dict[str, Any], layers: list[bool]) -> None:
    assert checkpointed_layers(adapted("llama", **keys)) == layers


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_reentrant_where_asked(
    quantization: str, reentrant: bool
) -> None:
    """PEFT's preparation turns checkpointing on too; what is asked comes after."""
    model: Any = adapted(
        "llama", checkpointing="full", reentrant=reentrant, quantization=quantization
    )

    layer = model.get_submodule(f"{PREFIX}model.layers.0")
    assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": reentrant}
