"""`inspect`: a configuration -> `Architecture`, read off the meta model's module tree.

No family is known by name: layers are what repeats in a list, attention is what lies
under a module that calls itself attention, experts are what is stacked once per expert.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from memplan import models
from memplan.architecture import Architecture, Block, Linear, Parameter
from memplan.errors import InputError, UnknownNameError
from memplan.model_source import ModelSource

LARGEST_NUM_LAYERS = 2048
"""More layers than any published model has by far: a config with more is a mistake."""

LARGEST_DIMENSION = 2**31 - 1
"""A tensor's side that CUDA kernels index with 32 bits."""

LARGEST_NUM_REGISTRATIONS = 100_000
"""Modules and parameters that building may register. The largest model of the catalog
registers 2,890; building more than the bound takes seconds and fills memory."""

_DEPTH = re.compile(r"layers?$|depth")
"""The keys that count layers, in any family's config. Some configs make a list of that
length when they are built, so they are read before."""

_EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
)
"""The names under which transformers' configs hold the number of experts."""


def inspect(source: ModelSource, *, trust_remote_code: bool = False) -> Architecture:
    """What the model that a configuration describes is made of.

    Raises InputError for a configuration that cannot be built.
    """
    config = build_config(source, trust_remote_code=trust_remote_code)
    model = build_meta_model(source.name, config, trust_remote_code=trust_remote_code)
    return read_tree(source, config, model)


def build_config(source: ModelSource, *, trust_remote_code: bool = False) -> Any:
    """The transformers config object of a configuration."""
    keys = {key: _with_floats(value) for key, value in source.config.items()}
    # It names the outputs of a classifier's head, which is never built, one by one.
    keys.pop("num_labels", None)
    model_type = keys.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError(
            "model_type", model_type, "names no family", "give a config.json that does"
        )
    _check_depths(source.name, source.config)
    if trust_remote_code and source.needs_remote_code:
        return _remote_config(source)
    config_class = _config_class(source, model_type)
    with _quiet(), _told_as_input_error(source.name):
        config = config_class(**keys)
        _check_sizes(source.name, config)
    return config


def build_meta_model(
    name: str, config: Any, *, trust_remote_code: bool = False, **kwargs: Any
) -> transformers.PreTrainedModel:
    """The model on the meta device: shapes without storage."""
    auto_class = _auto_class(config)
    with (
        _quiet(),
        _told_as_input_error(name),
        _bounded_registrations(name),
        torch.device("meta"),
    ):
        return auto_class.from_config(
            config, trust_remote_code=trust_remote_code, **kwargs
        )


def read_tree(
    source: ModelSource, config: Any, model: transformers.PreTrainedModel
) -> Architecture:
    """The architecture of a built model."""
    text_config = config.get_text_config()
    num_experts = _num_experts(text_config)
    head = model.get_output_embeddings()
    embedding = _input_embedding(model)
    reader = _Reader(model, num_experts)
    blocks = tuple(reader.blocks())
    linears, parameters = reader.rest()
    max_positions = _integer(text_config, "max_position_embeddings")
    head_weight = getattr(head, "weight", None)
    tied = head_weight is not None and head_weight is getattr(embedding, "weight", None)
    return Architecture(
        name=source.name,
        model_type=config.model_type,
        class_name=type(model).__name__,
        config=source.config,
        hidden_size=_integer(text_config, "hidden_size"),
        vocab_size=_integer(text_config, "vocab_size"),
        max_positions=max_positions or None,
        learned_positions=_learns_positions(model, max_positions),
        generative=is_generative(config),
        tied=tied,
        num_experts=num_experts,
        blocks=blocks,
        linears=linears,
        parameters=parameters,
        notes=tuple(_notes(config, blocks, num_experts)),
    )


def _input_embedding(model: transformers.PreTrainedModel) -> nn.Module | None:
    """The table of tokens; None for a model that has none or more than one."""
    try:
        embedding: nn.Module = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding


def _learns_positions(model: nn.Module, max_positions: int) -> bool:
    """Whether a table holds a vector for each position; a vision tower's is smaller."""
    return max_positions > 0 and any(
        isinstance(module, nn.Embedding)
        and module.num_embeddings >= max_positions
        and re.search(r"position|wpe", path.rpartition(".")[2])
        for path, module in model.named_modules()
    )


def is_generative(config: Any) -> bool:
    """Whether the model is a causal language model."""
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return (
        causal or config.model_type in models.MODEL_TYPES or _is_multimodal(config)
    ) and not _is_encoder(config)


def _config_class(source: ModelSource, model_type: str) -> Any:
    """The class of a family's configs; raises UnknownNameError for other families."""
    if model_type in models.MODEL_TYPES:
        models.register()
    known = transformers.CONFIG_MAPPING
    if model_type not in known:
        remedy = (
            "it brings code of its own: pass --trust-remote-code to run that code"
            if source.needs_remote_code
            else f"transformers {transformers.__version__} does not have it"
        )
        raise UnknownNameError("model_type", model_type, list(known), remedy)
    return known[model_type]


class _Reader:
    """Walks a module tree once, giving every parameter to one place."""

    def __init__(self, model: transformers.PreTrainedModel, num_experts: int) -> None:
        self.model = model
        self.num_experts = num_experts
        self._seen: set[int] = set()
        self._head = model.get_output_embeddings()
        self._stacks = dict(_stacks(model))

    def blocks(self) -> Iterator[Block]:
        """The layers of each stack, grouped by what they are made of."""
        for path, stack in self._stacks.items():
            signatures = _signatures(stack)
            for signature in dict.fromkeys(signatures):
                layers = [i for i, s in enumerate(signatures) if s == signature]
                yield self._block(path, stack, layers, signatures)

    def rest(self) -> tuple[tuple[Linear, ...], tuple[Parameter, ...]]:
        """The linears and other parameters outside of the stacks."""
        skipped = tuple(f"{path}." for path in self._stacks)
        return self._read(self.model, "", skipped)

    def _block(
        self,
        path: str,
        stack: nn.ModuleList,
        layers: list[int],
        signatures: list[_Signature],
    ) -> Block:
        first = stack[layers[0]]
        linears, parameters = self._read(first, f"{path}.{layers[0]}.")
        for other in layers[1:]:
            self._seen.update(id(p) for p in stack[other].parameters())
        return Block(
            name=_block_name(first, signatures, layers[0]),
            stack=path,
            layers=tuple(layers),
            linears=linears,
            parameters=parameters,
        )

    def _read(
        self, root: nn.Module, prefix: str, skipped: tuple[str, ...] = ()
    ) -> tuple[tuple[Linear, ...], tuple[Parameter, ...]]:
        linears: list[Linear] = []
        parameters: list[Parameter] = []
        for path, module in root.named_modules():
            if skipped and f"{path}.".startswith(skipped):
                continue
            kind = self._kind(f"{prefix}{path}".rstrip("."), module)
            if self._is_new_linear(module):
                linears.append(_linear(path, module, kind))
                self._seen.update(id(p) for p in module.parameters(recurse=False))
            else:
                parameters.extend(self._new_parameters(path, module, kind))
        return tuple(linears), tuple(parameters)

    def _new_parameters(
        self, path: str, module: nn.Module, kind: str
    ) -> Iterator[Parameter]:
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in self._seen:
                self._seen.add(id(parameter))
                yield Parameter(
                    path=f"{path}.{name}".lstrip("."),
                    shape=tuple(parameter.shape),
                    kind=self._parameter_kind(kind, parameter),
                )

    def _is_new_linear(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | Conv1D) and (
            id(module.weight) not in self._seen
        )

    def _kind(self, path: str, module: nn.Module) -> str:
        if module is self._head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if "norm" in type(module).__name__.lower():
            return "norm"
        if self._is_router(module):
            return "router"
        if _calls_itself(self.model, path, _ATTENTION):
            return "attention"
        in_stack = any(path.startswith(f"{stack}.") for stack in self._stacks)
        if in_stack and not _calls_itself(self.model, path, _RECURRENCE):
            return "mlp"
        return "other"

    def _is_router(self, module: nn.Module) -> bool:
        """Whether the module calls itself a router or has an output per expert."""
        weight = getattr(module, "weight", None)
        return self.num_experts > 1 and (
            "router" in type(module).__name__.lower()
            or (
                isinstance(weight, torch.Tensor)
                and weight.dim() == 2
                and weight.shape[0] == self.num_experts
            )
        )

    def _parameter_kind(self, kind: str, parameter: torch.Tensor) -> str:
        stacked = parameter.dim() >= 2 and parameter.shape[0] == self.num_experts
        if kind == "mlp" and self.num_experts > 1 and stacked:
            return "experts"
        return kind


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules that hold modules, in the order of the tree."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        inside = any(path.startswith(f"{stack}.") for stack in found)
        if not inside and all(any(layer.children()) for layer in module):
            found.append(path)
            yield path, module


def _signatures(stack: nn.ModuleList) -> list[_Signature]:
    """What each layer is made of; attributes that count the layers are left out."""
    owners: dict[int, int] = {}
    found = [_signature(layer, i, owners) for i, layer in enumerate(stack)]
    keys = dict.fromkeys(key for *_, attributes in found for key in attributes)
    counters = {key for key in keys if _counts([a.get(key) for *_, a in found])}
    return [
        (
            modules,
            shapes,
            tuple((k, v) for k, v in attributes.items() if k not in counters),
        )
        for modules, shapes, attributes in found
    ]


_Signature = tuple[tuple[Any, ...], tuple[Any, ...], tuple[Any, ...]]
"""A layer's classes by path, its parameters' shapes, and its plain attributes."""


def _signature(
    layer: nn.Module, index: int, owners: dict[int, int]
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """A layer's classes, shapes, and numbers, words and truth values by path.

    A parameter that an earlier layer holds too is told apart, for it is that layer's.
    """
    modules, shapes, attributes = [], [], {}
    for path, module in layer.named_modules():
        modules.append((path, type(module).__name__))
        for name, parameter in module.named_parameters(recurse=False):
            owner = owners.setdefault(id(parameter), index)
            shapes.append((path, name, tuple(parameter.shape), owner == index))
        for name, value in vars(module).items():
            if isinstance(value, bool | int | float | str) and name != "training":
                attributes[f"{path}.{name}"] = value
    return tuple(modules), tuple(shapes), attributes


def _counts(values: list[Any]) -> bool:
    """Whether the layers' values of an attribute are the layers' numbers, or follow.

    A layer that lacks the attribute is passed over.
    """
    have = [(i, v) for i, v in enumerate(values) if v is not None]
    if len(values) < 2 or not all(type(v) is int for _, v in have):
        return False
    if all(v == i for i, v in have):
        return True
    steps = {b[1] - a[1] for a, b in itertools.pairwise(have)}
    return len(have) == len(values) > 2 and len(steps) == 1 and steps != {0}


def _block_name(layer: nn.Module, signatures: list[_Signature], index: int) -> str:
    """The layer's class, with what sets its kind apart from the others in the stack."""
    own = signatures[index]
    others = [signature for signature in signatures if signature != own]
    words = [
        value
        for key, value in own[2]
        if isinstance(value, str)
        and any(dict(other[2]).get(key, value) != value for other in others)
    ]
    told = dict.fromkeys(words or _own_classes(own[0], [o[0] for o in others]))
    name = type(layer).__name__
    told.pop(name, None)
    return f"{name} ({', '.join(told)})" if told else name


def _own_classes(modules: Any, others: list[Any]) -> Iterator[str]:
    """Classes of the outermost modules that not every kind has at their path."""
    own = dict(m for m in modules if any(m not in other for other in others))
    for path, class_name in own.items():
        parts = path.split(".")
        if not any(".".join(parts[:i]) in own for i in range(len(parts))):
            yield class_name


_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_RECURRENCE = re.compile(r"Mixer|RecurrentBlock|ShortConv")
"""What mixes tokens and is neither attention nor an MLP: Mamba's layers, say."""


def _calls_itself(model: nn.Module, path: str, pattern: re.Pattern[str]) -> bool:
    """Whether the module, or one it lies in below its layer, has such a name."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        below = model.get_submodule(".".join(parts[:end]))
        called = f"{parts[end - 1]} {type(below).__name__}"
        if pattern.search(called) and not _is_layer(below):
            return True
    return False


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is more than attention: a layer with an MLP, or a model."""
    return any(
        re.search(r"mlp|feed_?forward|ffn|layers", name.lower())
        for name, _ in module.named_children()
    )


def _linear(path: str, module: nn.Module, kind: str) -> Linear:
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
    else:
        out_features, in_features = module.weight.shape  # type: ignore[misc]
    return Linear(
        path=path,
        in_features=int(in_features),
        out_features=int(out_features),
        bias=module.bias is not None,
        kind=kind,
        transposed=isinstance(module, Conv1D),
    )


def _auto_class(config: Any) -> Any:
    """The auto class that builds what is trained: generative, else the base."""
    if _is_encoder(config):
        return transformers.AutoModel
    model_type = config.model_type
    if model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForSeq2SeqLM
    if _is_multimodal(config):
        return transformers.AutoModelForImageTextToText
    if (
        model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or model_type in models.MODEL_TYPES
        or type(config) not in transformers.MODEL_MAPPING
    ):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _is_multimodal(config: Any) -> bool:
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return config.model_type in names and config.get_text_config() is not config


def _is_encoder(config: Any) -> bool:
    """Whether the family is trained to fill in masks, so that it has no causal loss."""
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return (masked and config.model_type not in seq2seq) or not hasattr(
        config.get_text_config(), "vocab_size"
    )


def _num_experts(text_config: Any) -> int:
    for name in _EXPERT_COUNTS:
        count = getattr(text_config, name, None)
        if isinstance(count, int) and count > 1:
            return count
    return 0


def _integer(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def _notes(config: Any, blocks: tuple[Block, ...], num_experts: int) -> Iterator[str]:
    if _is_multimodal(config):
        yield "The vision tower is counted; training is simulated on text alone."
    if num_experts and any(p.kind == "experts" for b in blocks for p in b.parameters):
        yield (
            "The experts are stacked parameters, not linear layers: bitsandbytes "
            "leaves them in 16 bits."
        )


_FLOATS = ("Infinity", "-Infinity", "NaN")
"""How transformers 5 writes what JSON has no number for (`_decode_special_floats`)."""


def _with_floats(value: Any) -> Any:
    """The config with its tagged floats, `{"__float__": "Infinity"}`, as floats."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return value


def _check_depths(name: str, config: Any) -> None:
    """Refuses a number of layers with which building would take for ever."""
    for key, value in _integers(config):
        if _DEPTH.search(key) and value > LARGEST_NUM_LAYERS:
            raise InputError(
                key,
                value,
                f"is more than {LARGEST_NUM_LAYERS} layers",
                f"mend the config of {name}",
            )


def _check_sizes(name: str, config: Any) -> None:
    """Refuses a model without layers, and sizes that no tensor has."""
    remedy = f"mend the config of {name}"
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        layers = getattr(part, "num_hidden_layers", 1)
        if isinstance(layers, int) and layers < 1:
            raise InputError("num_hidden_layers", layers, "is below 1", remedy)
        declared = {field.name for field in dataclasses.fields(part)}
        for key, value in vars(part).items():
            too_large = isinstance(value, int) and value > LARGEST_DIMENSION
            if key in declared and too_large:
                raise InputError(key, value, "is too large for a tensor", remedy)


def _integers(config: Any, key: str = "") -> Iterator[tuple[str, int]]:
    """The whole numbers within a config, each under the nearest key above it."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _integers(value, str(name))
    elif isinstance(config, list):
        for value in config:
            yield from _integers(value, key)
    elif isinstance(config, int) and not isinstance(config, bool):
        yield key, config


@contextlib.contextmanager
def _bounded_registrations(name: str) -> Iterator[None]:
    """Stops a model that registers modules and parameters without end."""
    count = 0

    def register(*_registered: object) -> None:
        nonlocal count
        count += 1
        if count > LARGEST_NUM_REGISTRATIONS:
            raise InputError(
                "model",
                name,
                f"has more than {LARGEST_NUM_REGISTRATIONS} modules and parameters",
                "mend its config.json",
            )

    hooks = (
        torch_module.register_module_module_registration_hook(register),
        torch_module.register_module_parameter_registration_hook(register),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _remote_config(source: ModelSource) -> Any:
    """The config object of a model that brings its own code, which is run."""
    where = str(source.path.parent if source.path else source.name)
    with _told_as_input_error(source.name):
        return transformers.AutoConfig.from_pretrained(where, trust_remote_code=True)


@contextlib.contextmanager
def _told_as_input_error(name: str) -> Iterator[None]:
    """Translates whatever a config makes transformers raise: configs are untrusted."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            "model",
            name,
            f"has a config that transformers cannot build ({reason[:200]})",
            "mend its config.json",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' advice about a config off the user's terminal."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
