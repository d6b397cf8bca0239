"""LLaMA-Factory's YAML, and a fresh adapter to resume.

LLaMA-Factory has one rank for all modules, but resumes an adapter as it is
(`create_new_adapter: false`): one that PEFT has just started, with its patterns. Keys
are those of LLaMA-Factory 0.9.5, `llamafactory.hparams`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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

ADAPTER_FOLDER = "plan_adapter"

ATTENTION = {"sdpa": "sdpa", "eager": "disabled"}
"""LLaMA-Factory's names (extras.constants.AttentionFunction)."""

KEPT = {"autocast", "max_grad_norm", "kbit_prepare"}
"""Keys of the recipe that the file hands on."""


class LlamaFactory(Exporter):
    """train.yaml and plan_adapter/."""

    summary: ClassVar[str] = "LLaMA-Factory's YAML with an adapter to resume"

    def check(self, task: Task) -> Statement:
        config(task)
        stated = Statement(
            unverified=(
                "the keys by LLaMA-Factory itself; memplan's tests hold their names "
                "against its 0.9.5.",
            )
        )
        if task.recipe.method == "full":
            return stated
        return verify(task, lora_config(task)) + stated

    def files(self, task: Task, statement: Statement) -> Mapping[str, str]:
        import yaml

        notes = (
            "dataset, template, learning_rate and num_train_epochs are placeholders: "
            "no memory depends on them.",
            "Trained parameters are cast to float32 unless pure_bf16 is set.",
            *differences(task, "transformers", KEPT),
        )
        text = yaml.safe_dump(config(task), sort_keys=False, allow_unicode=True)
        return {"train.yaml": commented(header(task, statement, notes)) + text}

    def add_weights(self, task: Task, folder: Path) -> None:
        if task.recipe.method == "full":
            return
        from memplan.training import installed

        installed.write_fresh_adapter(
            task.architecture,
            task.recipe,
            lora_config(task),
            folder / ADAPTER_FOLDER,
        )


def config(task: Task) -> dict[str, Any]:
    """The keys; raises InputError for what LLaMA-Factory has no key for."""
    recipe = task.recipe
    _check(recipe)
    checkpointing = former_checkpointing_keys(recipe)["gradient_checkpointing"]
    return {
        "model_name_or_path": task.model,
        "stage": "sft",
        "do_train": True,
        **_adapter(task),
        **_quantization(recipe),
        "dataset": "your_dataset",
        "template": "default",
        "cutoff_len": recipe.sequence_length,
        "packing": False,
        "flash_attn": ATTENTION[attention_name(recipe)],
        "enable_liger_kernel": recipe.loss == "liger",
        "disable_gradient_checkpointing": not checkpointing,
        "use_reentrant_gc": recipe.reentrant,
        "per_device_train_batch_size": recipe.batch_size,
        "gradient_accumulation_steps": recipe.accumulation,
        "optim": optimizer_name(recipe),
        "max_grad_norm": recipe.max_grad_norm or 0.0,
        "bf16": recipe.autocast == "bfloat16" or recipe.dtype == "bfloat16",
        "fp16": recipe.autocast == "float16",
        "learning_rate": 2e-4,
        "num_train_epochs": 1.0,
        "output_dir": "output",
    }


def _check(recipe: Recipe) -> None:
    if recipe.unquantized_modules != ("lm_head",) and recipe.quantization != "none":
        raise InputError(
            "unquantized_modules",
            recipe.unquantized_modules,
            "cannot be named to LLaMA-Factory",
            "leave it out, or export to trl",
        )


def _adapter(task: Task) -> dict[str, Any]:
    recipe = task.recipe
    if recipe.method == "full":
        return {"finetuning_type": "full"}
    made = lora_config(task)
    return {
        "finetuning_type": "lora",
        "adapter_name_or_path": f"./{ADAPTER_FOLDER}",
        "create_new_adapter": False,
        "lora_rank": made["r"],
        **_whole_alpha(made["lora_alpha"]),
        "lora_dropout": made["lora_dropout"],
        "lora_target": ",".join(made["target_modules"]),
        **({"use_rslora": True} if made["use_rslora"] else {}),
        **({"use_dora": True} if made["use_dora"] else {}),
    }


def _whole_alpha(alpha: float) -> dict[str, int]:
    """The alpha where it is a whole number; the adapter that is resumed has its own."""
    return {"lora_alpha": alpha} if isinstance(alpha, int) else {}


def _quantization(recipe: Recipe) -> dict[str, Any]:
    keys = quantization_keys(recipe)
    if not keys:
        return {}
    if "load_in_8bit" in keys:
        return {"quantization_bit": 8, "quantization_method": "bnb"}
    return {
        "quantization_bit": 4,
        "quantization_method": "bnb",
        "quantization_type": keys["bnb_4bit_quant_type"],
        "double_quantization": keys["bnb_4bit_use_double_quant"],
    }


PART = LlamaFactory()
