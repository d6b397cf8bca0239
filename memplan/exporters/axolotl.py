"""Axolotl's YAML: its adapter keys carry patterns of ranks and alphas.

Keys are those of axolotl 0.19, `axolotl.utils.schemas.config.AxolotlInputConfig`, with
which what is written is parsed where axolotl is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any, ClassVar

from memplan.errors import InputError
from memplan.exporters import Exporter, Statement, Task
from memplan.exporters._header import commented, header
from memplan.exporters._lora import lora_config, verify
from memplan.exporters._trainer import (
    attention_name,
    differences,
    former_checkpointing_keys,
    optimizer_name,
    quantization_keys,
)
from memplan.recipe import Recipe

FLAGS = {"use_rslora": "peft_use_rslora", "use_dora": "peft_use_dora"}
"""PEFT's flags under axolotl's names."""

_INTEGRATIONS = "axolotl.integrations"

LOSSES: dict[str, dict[str, Any]] = {
    "full": {},
    "chunked-logits": {"chunked_cross_entropy": True},
    "cut": {"plugins": [f"{_INTEGRATIONS}.cut_cross_entropy.CutCrossEntropyPlugin"]},
    "liger": {
        "plugins": [f"{_INTEGRATIONS}.liger.LigerPlugin"],
        "liger_fused_linear_cross_entropy": True,
    },
}
"""How a loss is asked for."""

SEMANTICS = {"autocast", "max_grad_norm", "adapter_dtype", "loss"}
"""Keys of the recipe that the file hands on."""


class Axolotl(Exporter):
    """config.yaml."""

    summary: ClassVar[str] = "axolotl's YAML"

    def check(self, task: Task) -> Statement:
        keys = config(task)
        adapter = Statement()
        if task.recipe.method != "full":
            adapter = verify(task, lora_config(task))
        return adapter + _parsed(keys)

    def files(self, task: Task, statement: Statement) -> Mapping[str, str]:
        import yaml

        notes = (
            "datasets, learning_rate and num_epochs are placeholders: no memory "
            "depends on them.",
            *differences(task, "transformers", SEMANTICS),
        )
        text = yaml.safe_dump(config(task), sort_keys=False, allow_unicode=True)
        return {"config.yaml": commented(header(task, statement, notes)) + text}


def config(task: Task) -> dict[str, Any]:
    """The keys; raises InputError for what axolotl has no key for."""
    recipe = task.recipe
    return {
        "base_model": task.model,
        **_quantization(recipe),
        **_adapter(task),
        "datasets": [{"path": "data.jsonl", "ds_type": "json", "type": "completion"}],
        "sequence_len": recipe.sequence_length,
        "sample_packing": False,
        "pad_to_sequence_len": True,
        "micro_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        **former_checkpointing_keys(recipe),
        "optimizer": optimizer_name(recipe),
        "max_grad_norm": recipe.max_grad_norm or 0.0,
        **_precision(recipe),
        "attn_implementation": attention_name(recipe),
        **_loss(recipe),
        "learning_rate": 2e-4,
        "num_epochs": 1,
        "output_dir": "./output",
    }


def _adapter(task: Task) -> dict[str, Any]:
    recipe = task.recipe
    if recipe.method == "full":
        return {}
    made = lora_config(task)
    alphas = {"lora_alpha": made["lora_alpha"], **made["alpha_pattern"]}
    for key, alpha in alphas.items():
        if not isinstance(alpha, int) or alpha < 1:
            raise InputError(
                "alpha", alpha, f"({key}) is no whole number, as axolotl wants", "round"
            )
    return {
        "adapter": "lora" if recipe.quantization == "none" else "qlora",
        "lora_r": made["r"],
        "lora_alpha": made["lora_alpha"],
        "lora_dropout": made["lora_dropout"],
        "lora_target_modules": made["target_modules"],
        **_given("lora_rank_pattern", made["rank_pattern"]),
        **_given("lora_alpha_pattern", made["alpha_pattern"]),
        **_given("lora_modules_to_save", made["modules_to_save"]),
        **{theirs: True for ours, theirs in FLAGS.items() if made[ours]},
        "peft_autocast_adapter_dtype": recipe.adapter_dtype == "float32",
    }


def _given(key: str, value: Any) -> dict[str, Any]:
    return {key: value} if value else {}


def _quantization(recipe: Recipe) -> dict[str, Any]:
    """`load_in_4bit` beside the other keys of BitsAndBytesConfig.

    Axolotl's adapter `qlora` means four bits; eight go with `lora`.
    """
    keys = quantization_keys(recipe)
    if "load_in_8bit" in keys:
        raise InputError(
            "quantization",
            recipe.quantization,
            "is not exported to axolotl, whose qlora means four bits",
            "use nf4-double, or export to trl",
        )
    if not keys:
        return {}
    four_bits = keys.pop("load_in_4bit")
    return {"load_in_4bit": four_bits, "bnb_config_kwargs": keys}


def _precision(recipe: Recipe) -> dict[str, Any]:
    return {
        "bf16": recipe.autocast == "bfloat16" or recipe.dtype == "bfloat16",
        "fp16": recipe.autocast == "float16",
        "tf32": False,
    }


def _loss(recipe: Recipe) -> Mapping[str, Any]:
    if recipe.loss not in LOSSES:
        raise InputError(
            "loss",
            recipe.loss,
            "is not one of axolotl's",
            f"use one of: {', '.join(LOSSES)}",
        )
    return LOSSES[recipe.loss]


def _parsed(keys: Mapping[str, Any]) -> Statement:
    """Whether axolotl's own classes take the keys, where they are installed."""
    try:
        from axolotl.utils.schemas.config import AxolotlInputConfig
    except ImportError:
        missing = (
            "the keys by axolotl itself, which is not installed here; memplan's tests "
            "hold them against the schema of axolotl 0.19.0."
        )
        return Statement(unverified=(missing,))
    try:
        AxolotlInputConfig(**keys)
    except ValueError as error:
        problem = f"is refused by axolotl ({' '.join(str(error).split())[:200]})"
        raise InputError(
            "recipe", keys["base_model"], problem, "export to trl"
        ) from error
    version = metadata.version("axolotl")
    return Statement(verified=(f"axolotl {version} parses the keys.",))


PART = Axolotl()
