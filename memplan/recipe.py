"""`Recipe`: how a model is trained.

Every key of a recipe file is a field of `Recipe` and, with dashes, an option of the
command line. `trainer` presets fill in what those loops do; keys given as well win.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from memplan.errors import InputError, UnknownNameError
from memplan.fields import (
    Choice,
    Flag,
    Integer,
    Kind,
    Names,
    Number,
    Options,
    Part,
    Pattern,
)

_DTYPES = ("float32", "bfloat16", "float16")


class _Preset:
    """Stands for a value that is not given: the trainer's preset fills it in."""

    def __repr__(self) -> str:
        return "PRESET"


PRESET: Any = _Preset()


def _key(kind: Kind, default: Any, text: str) -> Any:
    """A field of the recipe: what it may hold, its default, its line of help."""
    metadata = {"kind": kind, "help": text}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is trained: method, quantisation, optimizer, shapes and precision.

    Raises InputError for a value that its field cannot hold. Fields that are not given
    take what the trainer's loop really does, and `alpha` takes twice the rank.

    >>> import memplan
    >>> qlora = memplan.Recipe(rank=8, quantization="nf4-double", batch_size=2)
    >>> qlora.method, qlora.alpha, qlora.tokens
    ('lora', 16.0, 1024)
    """

    trainer: str = _key(
        Choice(("plain", "transformers", "trl")),
        "plain",
        "Whose training loop runs: presets for what it casts, clips and keeps.",
    )
    method: str = _key(Part("methods"), "lora", "The fine-tuning method.")
    rank: int = _key(Integer(1), 16, "Rank of the adapters.")
    alpha: float = _key(
        Number(0), PRESET, "Scale of the adapters times the rank [twice the rank]."
    )
    dropout: float = _key(Number(0, below=1), 0.0, "Dropout before the adapters.")
    targets: str | tuple[str, ...] = _key(
        Names(("all-linear", "attention", "mlp")),
        "all-linear",
        "Which linear layers are adapted: all-linear, attention, mlp, or names.",
    )
    rank_pattern: Mapping[str, int] = _key(
        Pattern(Integer(1)), {}, "Ranks by module, PEFT's syntax."
    )
    alpha_pattern: Mapping[str, float] = _key(
        Pattern(Number(0)), {}, "Alphas by module, PEFT's syntax."
    )
    lambda_pattern: Mapping[str, int] = _key(
        Pattern(Integer(1)), {}, "Group sizes by module, likewise."
    )
    trained_modules: tuple[str, ...] = _key(
        Names(), (), "Modules trained whole (PEFT's modules_to_save)."
    )
    method_options: Mapping[str, Any] = _key(
        Options(), {}, "The method's own options, as JSON."
    )
    adapter_dtype: str = _key(Choice(_DTYPES), PRESET, "Precision of the adapters.")
    input_casts: bool = _key(
        Flag(), True, "Whether adapters cast their input to their precision (PEFT)."
    )
    dtype: str = _key(Choice(_DTYPES), "bfloat16", "Precision of the loaded weights.")
    autocast: str = _key(
        Choice(("none", "bfloat16", "float16")), PRESET, "Precision of autocast."
    )
    quantization: str = _key(
        Part("quantizations"), "none", "How the frozen linear layers are stored."
    )
    unquantized_modules: tuple[str, ...] = _key(
        Names(), ("lm_head",), "Modules that stay unquantised (lm_head: any head)."
    )
    compute_dtype: str = _key(
        Choice(_DTYPES), "bfloat16", "Precision that quantised layers compute in."
    )
    kbit_prepare: bool = _key(
        Flag(), PRESET, "Whether PEFT's prepare_model_for_kbit_training runs."
    )
    optimizer: str = _key(Part("optimizers"), "adamw", "The optimizer.")
    max_grad_norm: float | None = _key(
        Number(0, above_minimum=True, optional=True),
        PRESET,
        "Norm to clip gradients at.",
    )
    batch_size: int = _key(Integer(1), 1, "Sequences in a micro-batch.")
    sequence_length: int = _key(Integer(1), 512, "Tokens in a sequence.")
    accumulation: int = _key(Integer(1), 1, "Micro-batches in a step.")
    padded: bool = _key(Flag(), False, "Whether an attention mask is made.")
    checkpointing: str = _key(
        Choice(("none", "full")), "none", "Whether blocks are recomputed in backward."
    )
    every_n_layers: int = _key(Integer(1), 1, "Checkpoint every n-th block.")
    offload: bool = _key(Flag(), False, "Whether checkpoints are kept on the host.")
    reentrant: bool = _key(Flag(), False, "Whether checkpointing is re-entrant.")
    loss: str = _key(Part("losses"), PRESET, "How the loss is computed.")
    attention: str = _key(
        Choice(("auto", "eager", "math", "efficient", "flash", "cudnn")),
        "auto",
        "Attention kernel; auto: the one PyTorch takes on the card.",
    )
    keep_outputs: str = _key(
        Choice(("backward", "step", "none")),
        PRESET,
        "How long the loop holds the model's output.",
    )

    def __post_init__(self) -> None:
        preset = _preset(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is PRESET:
                value = preset[field.name]
            value = field.metadata["kind"].check(field.name, value)
            if isinstance(value, dict):
                value = MappingProxyType(value)
            object.__setattr__(self, field.name, value)

    @property
    def tokens(self) -> int:
        """Tokens in a micro-batch, padding included."""
        return self.batch_size * self.sequence_length

    def to_json(self) -> dict[str, Any]:
        """The recipe as a recipe file holds it, every key resolved."""
        return {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)
        }

    @classmethod
    def from_mapping(cls, keys: Mapping[str, Any]) -> Recipe:
        """The recipe of the given keys; raises UnknownNameError for other keys."""
        known = field_names()
        for key in keys:
            if key not in known:
                raise UnknownNameError("recipe key", key, known)
        return cls(**keys)


def field_names() -> tuple[str, ...]:
    """The keys of a recipe, in their order."""
    return tuple(field.name for field in dataclasses.fields(Recipe))


def presets(trainer: str, quantization: str) -> dict[str, Any]:
    """What a trainer's loop does where the user does not say otherwise.

    plain: a loop around the model as PEFT prepares it, which holds the output until
    backward is done. transformers: `Trainer` clips at 1.0 and drops the output when
    `compute_loss` returns; it casts no weights, and autocast is off unless bf16 or fp16
    is asked for (TrainingArguments). trl: SFTConfig turns bf16 autocast on; SFTTrainer
    prepares nothing for k-bit training, casts the adapters of a quantised model to
    bfloat16, and computes the loss in chunks without ever holding the logits.
    """
    plain = {
        "adapter_dtype": "float32",
        "autocast": "none",
        "kbit_prepare": True,
        "max_grad_norm": None,
        "loss": "full",
        "keep_outputs": "backward",
    }
    transformers = plain | {"max_grad_norm": 1.0, "keep_outputs": "none"}
    trl = transformers | {
        "adapter_dtype": "float32" if quantization == "none" else "bfloat16",
        "autocast": "bfloat16",
        "kbit_prepare": False,
        "loss": "chunked",
    }
    return {"plain": plain, "transformers": transformers, "trl": trl}[trainer]


def _preset(recipe: Recipe) -> dict[str, Any]:
    """The values of the fields that were not given.

    Checks the three fields that they depend on, which may hold anything yet.
    """
    kinds = _kinds()
    trainer = kinds["trainer"].check("trainer", recipe.trainer)
    quantization = kinds["quantization"].check("quantization", recipe.quantization)
    rank = kinds["rank"].check("rank", recipe.rank)
    return {"alpha": 2.0 * rank, **presets(trainer, quantization)}


@functools.cache
def _kinds() -> dict[str, Kind]:
    return {field.name: field.metadata["kind"] for field in dataclasses.fields(Recipe)}


def recipe_schema() -> dict[str, Any]:
    """The recipe file as JSON schema (draft 2020-12)."""
    properties = {}
    for field in dataclasses.fields(Recipe):
        kind: Kind = field.metadata["kind"]
        properties[field.name] = {
            "description": field.metadata["help"],
            **kind.schema(),
        }
        if field.default is dataclasses.MISSING:
            properties[field.name]["default"] = {}
        elif field.default is not PRESET:
            properties[field.name]["default"] = _plain(field.default)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "memplan recipe",
        "description": "How a model is trained. Keys left out take their default, or "
        "what the trainer's loop does.",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def parse_option(name: str, text: str) -> Any:
    """The value of a recipe key given as an option's text."""
    return _kinds()[name].parse(name, text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Printed:
    """What a recipe's file says."""

    recipe: dict[str, Any]
    """The recipe's keys, not yet checked."""
    model: str | None
    """The model that the file names, if any."""
    printed: Mapping[str, Any]
    """The object that memplan printed, empty where the file is a bare recipe."""


def read_recipe_text(
    text: str, field: str, file: str | None = None
) -> tuple[dict[str, Any], str | None]:
    """The keys in a recipe file's text, JSON or YAML, and the model it names, if any.

    A plan, or any other object that memplan printed, is a recipe too: its `recipe` is
    taken, and its `model`. Errors name the file, or quote the text that is in none.
    """
    found = read_printed_text(text, field, file)
    return found.recipe, found.model


def read_printed_text(text: str, field: str, file: str | None = None) -> Printed:
    """What a recipe file's text says, with the printed object that it may be."""
    parsed = parse_json_or_yaml(text, field, file)
    if not isinstance(parsed, Mapping):
        raise InputError(
            field, parsed, "is not a mapping of keys to values", "write `rank: 16`, say"
        )
    if not isinstance(parsed.get("recipe"), Mapping):
        return Printed(recipe=dict(parsed), model=None, printed={})
    model = parsed.get("model")
    return Printed(
        recipe=dict(parsed["recipe"]),
        model=model if isinstance(model, str) else None,
        printed=parsed,
    )


def parse_json_or_yaml(text: str, field: str, file: str | None = None) -> Any:
    """What a text of JSON or YAML holds; raises InputError for neither.

    The error names the file, or quotes a text that is in none.
    """
    shown = text if file is None else file
    remedy = "write it as JSON or YAML"
    if not text.strip():
        raise InputError(field, shown, "is empty", remedy)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise InputError(field, shown, "is nested too deeply", remedy) from error
    except ValueError as error:
        problem = error
    try:
        return _parse_yaml(text)
    except ValueError as error:
        remedy = f"{remedy} (as JSON: {problem})"
        raise InputError(field, shown, str(error), remedy) from error


def _parse_yaml(text: str) -> Any:
    """What a text of YAML holds; raises ValueError, which says what it is instead."""
    import yaml

    try:
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        told = " ".join(str(error).split())[:120]
        raise ValueError(f"is not valid YAML ({told})") from error


def recipe_text(keys: Mapping[str, Any]) -> str:
    """Keys of a recipe, as plain values, as a file that `--recipe` takes."""
    import yaml

    text: str = yaml.safe_dump(dict(keys), sort_keys=False)
    return text if keys else ""


def _plain(value: Any) -> Any:
    """The value as JSON holds it."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
