"""Host memory: bytes of one process that no file stands behind, moment by moment.

Sources: transformers 5.23, `core_model_loading` (`_materialize_copy`: a checkpoint's
tensors are views of a mapped file until they are cast) and
`integrations.bitsandbytes.Bnb8bitQuantize`; aten/src/ATen/native/cuda/Copy.cu (a copy
between host and card casts on the host); safetensors 0.8, `torch.save_file` (keeps a
copy of every tensor of a file); peft 0.21, `tuners.lora.bnb` (merged weights pass
through the host).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from memplan import optimizers
from memplan.architecture import Architecture
from memplan.life import CARD, Life
from memplan.recipe import Recipe
from memplan.simulator.events import FREE, EventLog

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

FLOAT_BYTES = 4

SHARD_BYTES = 50 * 10**9
"""The largest file that a model is saved in (save_pretrained, `max_shard_size`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A parameter that is trained."""

    copies: int
    """How many parameters of the whole model it stands for."""
    shape: tuple[int, ...]
    element_bytes: int

    @property
    def count(self) -> int:
        """Numbers in all of the parameters it stands for."""
        return self.copies * math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What of a traced fine-tune bears on the host."""

    log: EventLog
    trained: tuple[Trained, ...]
    kept: tuple[tuple[int, int], ...]
    """Counts and element sizes of what a batch of the evaluation adds to be kept."""


def host_bytes(
    architecture: Architecture,
    recipe: Recipe,
    life: Life,
    traced: Traced,
    merge_log: EventLog | None,
) -> dict[str, int]:
    """Bytes by moment; `merge_log` is of a merge on the host, if there is one."""
    found = load_bytes(architecture, recipe)
    if life.resumes:
        found["resume_bytes"] = resume_bytes(recipe, traced.trained)
    if life.evaluation is not None and recipe.trainer != "plain":
        found["evaluate_bytes"] = kept_bytes(life.evaluation.num_batches, traced.kept)
    if life.saves:
        found["save_bytes"] = save_bytes(recipe, traced.trained)
    if life.merge == CARD:
        found["merge_bytes"] = card_merge_bytes(architecture, recipe, traced.log)
    elif merge_log is not None:
        found["merge_bytes"] = host_merge_bytes(architecture, recipe, merge_log)
    return found


def load_bytes(architecture: Architecture, recipe: Recipe) -> dict[str, int]:
    """What the load maps, shared between processes, and what each process copies.

    A checkpoint whose precision its config does not say is taken to be in the recipe's.
    """
    wanted = DTYPE_BYTES[recipe.dtype]
    stored_as = _checkpoint_dtype(architecture) or recipe.dtype
    is_cast = stored_as != recipe.dtype
    largest = _largest_tensor(architecture)
    copied = largest * wanted if is_cast else 0
    if recipe.quantization == "none" and is_cast:
        copied = architecture.total_parameters * wanted
    if recipe.quantization == "int8":
        copied = max(copied, _largest_quantised(architecture, recipe))
    return {
        "mapped_bytes": architecture.total_parameters * DTYPE_BYTES[stored_as],
        "load_bytes": copied,
    }


def resume_bytes(recipe: Recipe, trained: Iterable[Trained]) -> int:
    """The optimizer's state, read whole (Trainer._load_optimizer_and_scheduler)."""
    optimizer = optimizers.find(recipe.optimizer)
    return sum(
        one.copies * sum(optimizer.loaded_bytes(one.shape, one.element_bytes))
        for one in trained
    )


def save_bytes(recipe: Recipe, trained: Iterable[Trained]) -> int:
    """What was trained, as much of it as goes into one file."""
    size = sum(one.count * one.element_bytes for one in trained)
    return min(size, SHARD_BYTES) if recipe.method == "full" else size


def card_merge_bytes(architecture: Architecture, recipe: Recipe, log: EventLog) -> int:
    """The merged model as it is saved; before, a quantised weight passes through."""
    saved = min(_weights_bytes(log), SHARD_BYTES)
    if recipe.quantization == "none":
        return saved
    return max(saved, FLOAT_BYTES * _largest_linear(architecture))


def host_merge_bytes(architecture: Architecture, recipe: Recipe, log: EventLog) -> int:
    """Of a log in which an unquantised model is loaded, adapted and merged: its peak.

    On the CPU a sum of two precisions casts an operand first (TensorIterator.cpp,
    `compute_types`).
    """
    cast = recipe.dtype != recipe.adapter_dtype
    return _peak_bytes(log) + FLOAT_BYTES * _largest_linear(architecture) * cast


def kept_bytes(num_batches: int, tensors: Iterable[tuple[int, int]]) -> int:
    """What an evaluation keeps, as arrays of the host (`nested_numpify`).

    `tensors` are the counts and element sizes of what a batch adds. NumPy knows no
    bfloat16: half precision becomes single, beside the copy that it is cast from.
    """
    total = 0
    for count, element_bytes in tensors:
        size = num_batches * count * element_bytes
        total += size + (2 * size if element_bytes < FLOAT_BYTES else 0)
    return total


def _checkpoint_dtype(architecture: Architecture) -> str | None:
    """The precision that the config says its checkpoint is in, if it does."""
    config = architecture.config
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            name = str(part.get(key) or "").removeprefix("torch.")
            if name in DTYPE_BYTES:
                return name
    return None


def _largest_tensor(architecture: Architecture) -> int:
    """Elements of the largest parameter."""
    others = [p.num_parameters for p in architecture.parameters]
    for block in architecture.blocks:
        others += [p.num_parameters for p in block.parameters]
    return max([_largest_linear(architecture), *others])


def _largest_linear(architecture: Architecture) -> int:
    """Weights of the largest linear layer but the head."""
    return max(
        (
            linear.num_weights
            for _, linear in architecture.all_linears()
            if linear.kind != "head"
        ),
        default=0,
    )


def _largest_quantised(architecture: Architecture, recipe: Recipe) -> int:
    """What passes through the host of a weight that becomes 8 bits, the largest.

    The weight; a copy in rows, if it is held in columns; its cast to float16, in which
    it is quantised (Int8Params._quantize).
    """
    wanted = DTYPE_BYTES[recipe.dtype]
    half = DTYPE_BYTES["float16"] if recipe.dtype != "float16" else 0
    return max(
        (
            linear.num_weights * (wanted * (1 + linear.transposed) + half)
            for _, linear in architecture.all_linears()
            if linear.kind != "head"
        ),
        default=0,
    )


def _weights_bytes(log: EventLog) -> int:
    """Bytes of weights, with what dequantising them needs, that live at the end."""
    live: set[int] = set()
    for block, num_bytes in log.events:
        if num_bytes == FREE:
            live.discard(block)
        elif block >= 0:
            live.add(block)
    kinds = ("weights", "quantization_state")
    return sum(log.sizes[block] for block in live if log.categories[block] in kinds)


def _peak_bytes(log: EventLog) -> int:
    """The most bytes that live at once, without what kernels of a card take."""
    total = peak = 0
    for block, num_bytes in log.events:
        if block < 0 or log.categories[block] == "workspace":
            continue
        total += -log.sizes[block] if num_bytes == FREE else num_bytes
        peak = max(peak, total)
    return peak
