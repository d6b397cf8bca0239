"""`inspect`: a configuration -> `Architecture`, read off the meta model's module tree.

No family is known by name: layers are what repeats in a list, attention is what lies
under a module that calls itself attention, experts are what is stacked once per expert.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
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
    keys = dict(source.config)
    model_type = keys.pop("model_type", None)
    if not isinstance(model_type, str):
        raise InputError(
            "model_type", model_type, "names no family", "give a config.json that does"
        )
    if trust_remote_code and source.needs_remote_code:
        return _remote_config(source)
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
    with _quiet(), _told_as_input_error(source.name):
        config = known[model_type](**keys)
    _check_sizes(source.name, config)
    return config


def build_meta_model(
    name: str, config: Any, *, trust_remote_code: bool = False, **kwargs: Any
) -> nn.Module:
    """The model on the meta device: shapes without storage."""
    auto_class = _auto_class(config)
    with _quiet(), _told_as_input_error(name), torch.device("meta"):
        return auto_class.from_config(
            config, trust_remote_code=trust_remote_code, **kwargs
        )


def read_tree(source: ModelSource, config: Any, model: nn.Module) -> Architecture:
    """The architecture of a built model."""
    text_config = config.get_text_config()
    num_experts = _num_experts(text_config)
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    reader = _Reader(model, num_experts)
    blocks = tuple(reader.blocks())
    linears, parameters = reader.rest()
    head_weight = getattr(head, "weight", None)
    tied = head_weight is not None and head_weight is getattr(embedding, "weight", None)
    return Architecture(
        name=source.name,
        model_type=config.model_type,
        class_name=type(model).__name__,
        config=source.config,
        hidden_size=_integer(text_config, "hidden_size"),
        vocab_size=_integer(text_config, "vocab_size"),
        max_positions=_integer(text_config, "max_position_embeddings") or None,
        learned_positions=reader.learned_positions,
        generative=is_generative(config),
        tied=tied,
        num_experts=num_experts,
        blocks=blocks,
        linears=linears,
        parameters=parameters,
        notes=tuple(_notes(config, blocks, num_experts)),
    )


def is_generative(config: Any) -> bool:
    """Whether the model is a causal language model."""
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return (
        causal or config.model_type in models.MODEL_TYPES or _is_multimodal(config)
    ) and not _is_encoder(config)


class _Reader:
    """Walks a module tree once, giving every parameter to one place."""

    def __init__(self, model: nn.Module, num_experts: int) -> None:
        self.model = model
        self.num_experts = num_experts
        self.learned_positions = False
        self._seen: set[int] = set()
        self._head = model.get_output_embeddings()  # type: ignore[operator]
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
        self, path: str, stack: nn.ModuleList, layers: list[int], signatures: list[Any]
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
            if isinstance(module, nn.Embedding | nn.Linear | Conv1D):
                self._note_positions(path, module)
            if self._is_new_linear(module):
                linears.append(_linear(path, module, kind))
                self._seen.update(id(p) for p in module.parameters(recurse=False))
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) in self._seen:
                    continue
                self._seen.add(id(parameter))
                parameters.append(
                    Parameter(
                        path=f"{path}.{name}".lstrip("."),
                        shape=tuple(parameter.shape),
                        kind=self._parameter_kind(kind, parameter),
                    )
                )
        return tuple(linears), tuple(parameters)

    def _is_new_linear(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | Conv1D) and (
            id(module.weight) not in self._seen
        )

    def _note_positions(self, path: str, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding) and re.search(
            r"position|wpe", path.rsplit(".", 1)[-1]
        ):
            self.learned_positions = True

    def _kind(self, path: str, module: nn.Module) -> str:
        if module is self._head:
            return "head"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if "norm" in type(module).__name__.lower():
            return "norm"
        if self._is_router(module):
            return "router"
        if _under_attention(self.model, path):
            return "attention"
        if any(path.startswith(f"{stack}.") for stack in self._stacks):
            return "mlp"
        return "other"

    def _is_router(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return (
            self.num_experts > 1
            and isinstance(weight, torch.Tensor)
            and weight.dim() == 2
            and weight.shape[0] == self.num_experts
        )

    def _parameter_kind(self, kind: str, parameter: torch.Tensor) -> str:
        stacked = parameter.dim() >= 2 and parameter.shape[0] == self.num_experts
        if kind == "mlp" and self.num_experts > 1 and stacked:
            return "experts"
        return kind


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers of one class, in the order of the tree."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        inside = any(path.startswith(f"{stack}.") for stack in found)
        alike = len({type(layer) for layer in module}) == 1
        if alike and not inside and next(module[0].children(), None) is not None:
            found.append(path)
            yield path, module


def _signatures(stack: nn.ModuleList) -> list[tuple[Any, ...]]:
    """What each layer is made of: classes, parameter shapes and plain attributes.

    Attributes that count the layers are left out.
    """
    plain = [_plain_attributes(layer) for layer in stack]
    keys = dict.fromkeys(key for attributes in plain for key in attributes)
    counters = {
        key
        for key in keys
        if len(stack) > 1
        and all(attributes.get(key, i) == i for i, attributes in enumerate(plain))
    }
    return [
        (
            tuple((n, type(m).__name__) for n, m in layer.named_modules()),
            tuple((n, tuple(p.shape)) for n, p in layer.named_parameters()),
            tuple((k, v) for k, v in attributes.items() if k not in counters),
        )
        for layer, attributes in zip(stack, plain, strict=True)
    ]


def _plain_attributes(layer: nn.Module) -> dict[str, Any]:
    """The layer's numbers, words and truth values, by path."""
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    }


def _block_name(layer: nn.Module, signatures: list[Any], index: int) -> str:
    """The layer's class, with the attributes in which its kind differs from others."""
    name = type(layer).__name__
    if len(set(signatures)) == 1:
        return name
    own = dict(signatures[index][2])
    others = [dict(s[2]) for s in signatures if s != signatures[index]]
    words = [
        value
        for key, value in own.items()
        if isinstance(value, str) and any(o.get(key) != value for o in others)
    ]
    classes = [c for _, c in signatures[index][0] if _sets_apart(c, signatures, index)]
    told = list(dict.fromkeys([*words, *classes]))
    return f"{name} ({', '.join(told)})" if told else name


def _sets_apart(class_name: str, signatures: list[Any], index: int) -> bool:
    """Whether layers of other kinds hold no module of that class."""
    return any(
        class_name not in {c for _, c in signature[0]}
        for signature in signatures
        if signature != signatures[index]
    )


def _under_attention(model: nn.Module, path: str) -> bool:
    """Whether the module, or one it lies in below its layer, calls itself attention."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        below = model.get_submodule(".".join(parts[:end]))
        called = f"{parts[end - 1]} {type(below).__name__}".lower()
        if re.search(r"attn|attention", called) and not _is_layer(below):
            return True
    return False


def _is_layer(module: nn.Module) -> bool:
    """Whether the module is more than attention: a list, or a layer with an MLP."""
    return isinstance(module, nn.ModuleList) or any(
        re.search(r"mlp|feed_?forward|ffn", name.lower())
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


def _check_sizes(name: str, config: Any) -> None:
    """Refuses sizes with which building would take for ever or overflow."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and not 0 < layers <= LARGEST_NUM_LAYERS:
            raise InputError(
                "num_hidden_layers",
                layers,
                f"is not a depth between 1 and {LARGEST_NUM_LAYERS}",
                f"mend the config of {name}",
            )
        for key, value in _integers(part.to_dict()):
            if value > LARGEST_DIMENSION and key != "model_max_length":
                raise InputError(
                    key,
                    value,
                    "is too large for a tensor",
                    f"mend the config of {name}",
                )


def _integers(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield key, value
        elif isinstance(value, Mapping):
            yield from _integers(value)


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
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            "model",
            name,
            f"has a config that transformers cannot build ({first_line[:160]})",
            "mend its config.json",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' advice about a config off the user's terminal."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
