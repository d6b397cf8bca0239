"""Module trees of memplan's own, for families that transformers does not have.

A tree carries the published names, shapes and operations, so that adapters, quantisers
and autograd find in it what they would find in the published model, and no code from
the hub is run. It is for tracing and measuring; published weights fit it by name.
"""

from __future__ import annotations

MODEL_TYPES: frozenset[str] = frozenset({"baichuan", "chatglm", "internlm2", "minicpm"})
"""The `model_type`s of the configurations that `register` adds to transformers."""


def register() -> None:
    """Make AutoConfig and AutoModelForCausalLM know the families of `MODEL_TYPES`.

    A type that they know already stays as it is, so calling again changes nothing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from memplan.models import baichuan, chatglm, internlm2, minicpm

    for model in (
        baichuan.BaichuanForCausalLM,
        chatglm.ChatGLMForConditionalGeneration,
        internlm2.InternLM2ForCausalLM,
        minicpm.MiniCPMForCausalLM,
    ):
        config = model.config_class
        if config.model_type not in CONFIG_MAPPING:
            AutoConfig.register(config.model_type, config)
            AutoModelForCausalLM.register(config, model)
