"""Which tapes a recipe needs: what of it decides how the step runs, sizes aside."""

from __future__ import annotations

import dataclasses
import json

from memplan import kernels, quantizations
from memplan.architecture import Architecture
from memplan.estimator.layout import Role
from memplan.gpu import Gpu
from memplan.recipe import Recipe
from memplan.tape import (
    DYNAMIC,
    STATIC,
    STATIC_WINDOW,
    Heads,
    LayerRegime,
    LossRegime,
    ModelTape,
    Regime,
)

_HALF = {"float16": "bfloat16"}
"""Half precisions, whose tensors and kernels are of the same sizes."""

TURING = "T4"
"""The card that stands for those before Ampere, whose kernels do not know bfloat16."""

_SAME_TAPE = {
    "rslora": "lora",
    "lora-plus": "lora",
    "fp4": "nf4",
    "fp4-double": "nf4-double",
}
"""Methods and schemes that run as others do: only values or learning rates differ."""


def _same_sizes(recipe: Recipe) -> dict[str, str]:
    """The precisions that may stand for each other: none where both halves occur.

    Then tensors are cast from one to the other.
    """
    used = {recipe.dtype, recipe.autocast, recipe.adapter_dtype}
    if recipe.quantization != "none":
        used.add(recipe.compute_dtype)
    return {} if {"float16", "bfloat16"} <= used else _HALF


def is_prepared(recipe: Recipe) -> bool:
    """Whether PEFT's k-bit preparation casts what is not quantised to float32."""
    return (
        recipe.quantization != "none"
        and quantizations.find(recipe.quantization).kbit_casts
        and recipe.kbit_prepare
        and recipe.method != "full"
    )


def dtype_outside(recipe: Recipe) -> str:
    """The precision of parameters outside of quantised layers, while training."""
    return "float32" if is_prepared(recipe) else recipe.dtype


def hidden_dtype(recipe: Recipe) -> str:
    """The precision of attention's operands."""
    return recipe.autocast if recipe.autocast != "none" else dtype_outside(recipe)


def first_regime(recipe: Recipe) -> Regime:
    """The regime from whose tape the heads and the window are read."""
    return Regime(
        dtype="bfloat16",
        autocast="none",
        casts_output=False,
        attention="eager" if recipe.attention == "eager" else "flash",
        masked_attention="eager" if recipe.attention == "eager" else "efficient",
        padded=False,
        windowed=False,
        trained=False,
        checkpointed=False,
    )


def model_regime(
    recipe: Recipe,
    gpu: Gpu,
    heads: tuple[Heads, ...],
    window: int | None,
    *,
    experts: bool = False,
) -> Regime:
    """The regime of the model's body; `experts` says whether theirs are adapted."""
    attention, masked = _attention(recipe, gpu, heads)
    card = _card_class(gpu) if "efficient" in (attention, masked) else ""
    # Eager attention adds a mask in its precision; Turing's kernels know one half.
    alike = "eager" not in (attention, masked) and card != TURING
    same = _same_sizes(recipe) if alike else {}
    dtype, autocast = dtype_outside(recipe), recipe.autocast
    adapter_dtype = same.get(recipe.adapter_dtype, recipe.adapter_dtype)
    return Regime(
        dtype=same.get(dtype, dtype),
        autocast=same.get(autocast, autocast),
        casts_output=recipe.autocast != "none" and recipe.quantization == "none",
        attention=attention,
        masked_attention=masked,
        padded=recipe.padded,
        windowed=window is not None and recipe.sequence_length > window,
        trained=recipe.method == "full",
        checkpointed=recipe.checkpointing == "full",
        card=card,
        experts=f"{recipe.targets}:{adapter_dtype}" if experts else "",
    )


def answering_regime(  # noqa: PLR0913 - each decides how prompts are read
    architecture: Architecture,
    recipe: Recipe,
    gpu: Gpu,
    first: ModelTape,
    *,
    experts: bool,
    room: int | None,
) -> Regime:
    """The regime of the model's body while it reads prompts.

    A checkpoint's first forward keeps nothing for backward, and so stands for one
    without autograd, unless the model drops out, which it does in training alone.

    `room` are the tokens of a static cache, None without one. Unless there is a mask,
    only those that were read are attended to (transformers.integrations.sdpa_attention)
    and a mask is left out unless it hides what is read (masking_utils,
    `_ignore_causal_mask_sdpa`).
    """
    passing = dataclasses.replace(recipe, method="lora", checkpointing="full")
    regime = model_regime(passing, gpu, first.attention, first.window, experts=experts)
    answers = DYNAMIC if drops_out(architecture) else ""
    if room is not None:
        window = first.window or room + 1
        if recipe.sequence_length <= window <= room:
            answers = STATIC_WINDOW
        elif recipe.padded or regime.attention == "eager":
            answers = STATIC
    masks = regime.padded or regime.windowed or answers in (STATIC, STATIC_WINDOW)
    kernels_run = {_attention(passing, gpu, (one,))[0] for one in first.attention}
    if not masks and "efficient" not in kernels_run and regime.card != TURING:
        # The forward of other kernels takes the same on every card of these.
        regime = dataclasses.replace(regime, card="")
    if not answers:
        return regime
    return dataclasses.replace(regime, checkpointed=False, answers=answers)


def drops_out(architecture: Architecture) -> bool:
    """Whether the model's own layers drop out while it is trained."""
    config = architecture.config
    config = {**config, **config.get("text_config", {})}
    return any(
        "drop" in key and isinstance(share, float) and share > 0
        for key, share in config.items()
    )


def _card_class(gpu: Gpu) -> str:
    """A card whose memory-efficient kernels work on tiles as those of `gpu` do."""
    if gpu.compute_capability < (8, 0):
        return TURING
    large = gpu.compute_capability in ((8, 0), (9, 0), (10, 0))
    return "A100-SXM4-80GB" if large else ""


def _attention(recipe: Recipe, gpu: Gpu, heads: tuple[Heads, ...]) -> tuple[str, str]:
    """The kernels of attention without and with a mask."""
    if recipe.attention == "eager" or not heads:
        return "eager", "eager"
    unmasked = kernels.choose(
        "auto" if recipe.padded else recipe.attention,
        _shapes(recipe, heads[0], masked=False),
        gpu,
    )
    masked = kernels.choose(
        recipe.attention if recipe.padded else "auto",
        _shapes(recipe, heads[0], masked=True),
        gpu,
    )
    return unmasked, masked


def _shapes(recipe: Recipe, heads: Heads, *, masked: bool) -> kernels.Shapes:
    batch, length = recipe.batch_size, recipe.sequence_length
    repeats = heads.grouped and (masked or recipe.attention == "efficient")
    return kernels.Shapes(
        query=(batch, heads.query, length, heads.query_dim),
        key=(batch, heads.query if repeats else heads.key, length, heads.query_dim),
        value=(batch, heads.query if repeats else heads.key, length, heads.value_dim),
        dtype=hidden_dtype(recipe),
        masked=masked,
        causal=not masked,
        dropout=0.0,
        grouped=heads.grouped and not repeats,
        dense_rows=heads.dense_rows,
        trains=True,
    )


def is_head_trained(recipe: Recipe) -> bool:
    """Whether the head's weight gets a gradient."""
    return recipe.method == "full" or "lm_head" in recipe.trained_modules


def is_embedding_trained(architecture: Architecture, recipe: Recipe) -> bool:
    """Whether the token embeddings get a gradient."""
    embedding = (architecture.vocab_size, architecture.hidden_size)
    return recipe.method == "full" or any(
        is_named(parameter.path.rpartition(".")[0], recipe)
        for parameter in architecture.parameters
        if parameter.kind == "embedding" and parameter.shape == embedding
    )


def is_named(path: str, recipe: Recipe) -> bool:
    """Whether a module is trained whole (PEFT's modules_to_save)."""
    return any(path.endswith(name) for name in recipe.trained_modules)


def loss_regime(recipe: Recipe, hidden_dtype: str) -> LossRegime:
    """The regime of head and loss on hidden states of that precision."""
    dtype, same = dtype_outside(recipe), _same_sizes(recipe)
    return LossRegime(
        loss=recipe.loss,
        dtype=same.get(dtype, dtype),
        hidden_dtype=same.get(hidden_dtype, hidden_dtype),
        autocast=same.get(recipe.autocast, recipe.autocast),
        float32_outputs=recipe.trainer != "plain" and recipe.autocast != "none",
        trained=is_head_trained(recipe),
        keeps_output=recipe.keep_outputs != "none",
    )


def layer_regime(recipe: Recipe, role: Role, input_dtype: str) -> LayerRegime:
    """The regime of a linear layer; what it does not depend on is left as it is."""
    quantization = recipe.quantization if role.quantized else "none"
    quantization = _SAME_TAPE.get(quantization, quantization)
    same = {} if quantization == "int8" else _same_sizes(recipe)
    dtype = recipe.dtype if role.quantized else dtype_outside(recipe)
    compute_dtype = recipe.compute_dtype if role.quantized else "bfloat16"
    adapter_dtype = recipe.adapter_dtype if role.adapted else "float32"
    unadapted = "full" if recipe.method == "full" else "frozen"
    by_trl = recipe.trainer == "trl" and recipe.quantization != "none"
    return LayerRegime(
        method=_SAME_TAPE.get(recipe.method, recipe.method)
        if role.adapted
        else unadapted,
        quantization=quantization,
        dtype=same.get(dtype, dtype),
        input_dtype=same.get(input_dtype, input_dtype),
        autocast=same.get(recipe.autocast, recipe.autocast),
        compute_dtype=same.get(compute_dtype, compute_dtype),
        adapter_dtype=same.get(adapter_dtype, adapter_dtype),
        input_casts=recipe.input_casts if role.adapted else True,
        dropout=role.adapted and recipe.dropout > 0,
        bias=role.linear.bias,
        by_trl=role.adapted and recipe.method == "dora" and by_trl,
        options=json.dumps(dict(role.options)) if role.adapted and role.options else "",
    )
