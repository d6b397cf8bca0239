"""Traces the tapes that the catalog ships: `python profiles/tapes/make_tapes.py`.

Every generative model is estimated under the recipes that most people run, which reads
or traces the tapes they need; what was traced is written. Names of models may be given.
A model whose file is there is passed by, unless --again is given, which traces what is
missing there; --layers traces the linear layers alone, --inference what answering needs
besides.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ["MEMPLAN_CACHE"] = "off"

from memplan import registry, tapes
from memplan.architecture import Architecture
from memplan.catalog import catalog_models, inspect
from memplan.errors import InputError
from memplan.estimator import inference
from memplan.estimator.experts import adapts_experts
from memplan.estimator.regimes import drops_out, first_regime
from memplan.estimator.reserved import reserved, tracks_of
from memplan.estimator.schedule import parts_of
from memplan.generation import DYNAMIC, STATIC
from memplan.gpu import Gpu, find_gpu
from memplan.inference import NONE, Inference, loaded_as
from memplan.recipe import Recipe

CARDS = ("RTX 3060", "A100-SXM4-80GB", "H100 80GB HBM3", "B200", "T4")
"""Flash attention on small and on large cards, cuDNN's, also that for latent heads,
and the memory-efficient one."""

FEW = "Tesla T4"
"""The card of which only the most usual recipes are traced, in both halves: it knows
one, and has no fast kernel for the other."""

LAYER_MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "openai-community/gpt2",
    "tiiuae/falcon-7b",
)
"""Models whose linear layers have no bias, have one, and are not quantised."""

UNTRACEABLE = (InputError, AttributeError, RuntimeError, TypeError, ValueError)

LONG = 2**18
"""A sequence longer than any window."""


def recipes() -> Iterator[dict[str, Any]]:
    """The keys of the recipes that tapes are traced for."""
    both = ("none", "full")
    for checkpointing in both:
        base: dict[str, Any] = {"checkpointing": checkpointing}
        for quantization in ("none", "nf4-double", "int8"):
            yield base | {"quantization": quantization}
            yield base | {"quantization": quantization, "attention": "eager"}
        for trainer, quantization in itertools.product(
            ("transformers", "trl"), ("none", "nf4-double")
        ):
            yield base | {"trainer": trainer, "quantization": quantization}
        yield base | {"method": "full"}
        yield base | {"method": "full", "trainer": "trl"}


def layer_recipes() -> Iterator[dict[str, Any]]:
    """The keys of further recipes, for the tapes of linear layers alone."""
    for method, quantization, dropout, trainer in itertools.product(
        (name for name in registry.names("methods") if name not in ("full", "peft")),
        ("none", "nf4", "nf4-double", "int8"),
        (0.0, 0.1),
        ("plain", "trl"),
    ):
        yield {
            "method": method,
            "quantization": quantization,
            "dropout": dropout,
            "trainer": trainer,
            "targets": "mlp",
        }
    for quantization in registry.names("quantizations"):
        yield {"quantization": quantization}
        yield {"quantization": quantization, "checkpointing": "full"}


def inference_recipes() -> Iterator[dict[str, Any]]:
    """The keys of recipes under which tuned models answer."""
    methods = [name for name in registry.names("methods") if name != "peft"]
    quantizations = ("none", "nf4", "nf4-double", "int8")
    dtypes = ("bfloat16", "float16", "float32")
    for method, quantization, dtype in itertools.product(
        methods, quantizations, dtypes
    ):
        yield {
            "method": method,
            "quantization": quantization,
            "dtype": dtype,
            "targets": "mlp",
        }


def answering_recipes(*, eager: bool) -> Iterator[dict[str, Any]]:
    """The keys of recipes that decide how a model without adapters answers."""
    kernels = ("auto", "eager") if eager else ("auto",)
    dtypes = ("bfloat16", "float16", "float32")
    for dtype, attention in itertools.product(dtypes, kernels):
        yield {"dtype": dtype, "attention": attention}


def make_inference(names: list[str]) -> None:
    """Traces and writes what answering needs: linear layers, and every cache.

    With names, only how these models read prompts.
    """
    if names:
        make_answering(names)
        return
    card = find_gpu(CARDS[0])
    for name, keys in itertools.product(LAYER_MODELS, inference_recipes()):
        with contextlib.suppress(InputError):
            recipe = loaded_as(Recipe(**keys))
            inference.parts_of(inspect(name), recipe, Inference(), card)
    for model in catalog_models():
        if not model.architecture.generative:
            continue
        try:
            tapes.cache_tape(model.architecture)
        except UNTRACEABLE:
            print(f"{model.architecture.name} cannot be traced", file=sys.stderr)
    path = tapes.shipped_path(tapes.INFERENCE)
    tapes.write(path, tapes.inference_file().lines)
    make_answering(names)


def make_answering(names: list[str]) -> None:
    """Traces and writes how models read prompts otherwise than while they are trained.

    Those do that drop out there, or whose experts are adapted; and, into a static
    cache, those with windows, which prompts may be shorter than, and those that have
    eager attention alone.
    """
    for model in catalog_models():
        architecture = model.architecture
        if not architecture.generative or (names and architecture.name not in names):
            continue
        with contextlib.suppress(*UNTRACEABLE):
            _make_answering(architecture)


def _make_answering(architecture: Architecture) -> None:
    first = tapes.model_tape(architecture, first_regime(Recipe()))
    lengths = (min(512, first.window), LONG) if first.window else (512,)
    if drops_out(architecture) or adapts_experts(architecture, Recipe()):
        _trace_answers(architecture, lengths, DYNAMIC)
    windows = (first.window,) if first.window else ()
    if windows or not first.attention:
        own = windows if first.attention else (*lengths, *windows)
        _trace_answers(architecture, own, STATIC)
    path = tapes.shipped_path(tapes.name_of(architecture))
    tapes.write(path, tapes.file_of(architecture).lines)


def _trace_answers(
    architecture: Architecture, lengths: tuple[int, ...], cache: str
) -> None:
    asked = Inference(adapters=NONE, cache=cache)
    recipes = answering_recipes(eager=cache == DYNAMIC)
    for told, card, length in itertools.product(recipes, CARDS, lengths):
        with contextlib.suppress(InputError):
            recipe = loaded_as(Recipe(**told, sequence_length=length))
            inference.parts_of(architecture, recipe, asked, find_gpu(card))


def main(names: list[str]) -> None:
    """Traces and writes the tapes of models, one after the other."""
    cards = [find_gpu(name) for name in CARDS]
    known = {model.architecture.name: model.architecture for model in catalog_models()}
    for name in names or known:
        architecture = known[name]
        path = tapes.shipped_path(tapes.name_of(architecture))
        if not architecture.generative:
            continue
        if path.is_file() and "--again" not in sys.argv:
            continue
        if not _make(architecture, cards):
            print(f"{name} cannot be traced", file=sys.stderr)


def _make(architecture: Architecture, cards: list[Gpu]) -> bool:
    """Traces and writes a model's tapes; whether it can be traced at all."""
    try:
        first = tapes.model_tape(architecture, first_regime(Recipe()))
    except UNTRACEABLE:
        return False
    lengths = (min(512, first.window), LONG) if first.window else (512,)
    for keys, card, length in itertools.product(recipes(), cards, lengths):
        asked = [keys]
        if card.name == FEW:
            if not keys.keys() <= {"checkpointing", "quantization", "method"}:
                continue
            asked.append(keys | {"dtype": "float16", "compute_dtype": "float16"})
        for told in asked:
            with contextlib.suppress(InputError):
                recipe = Recipe(**told, sequence_length=length)
                tracks_of(parts_of(architecture, recipe, card))
    name = tapes.name_of(architecture)
    for kind in tapes.KINDS:
        lines = tapes.file_of(architecture, kind).lines
        tapes.write(tapes.shipped_path(name, kind), lines)
    return True


def make_layers() -> None:
    """Traces and writes the tapes of linear layers."""
    card = find_gpu(CARDS[0])
    for name, keys in itertools.product(LAYER_MODELS, (*recipes(), *layer_recipes())):
        architecture = inspect(name)
        with contextlib.suppress(InputError):
            reserved(parts_of(architecture, Recipe(**keys), card), 1, 512, None)
    for kind in tapes.KINDS:
        path = tapes.shipped_path(tapes.LAYERS, kind)
        tapes.write(path, tapes.layers_file(kind).lines)


if __name__ == "__main__":
    named = [name for name in sys.argv[1:] if not name.startswith("--")]
    if "--inference" in sys.argv:
        make_inference(named)
    elif "--layers" in sys.argv:
        make_layers()
    else:
        main(named)
