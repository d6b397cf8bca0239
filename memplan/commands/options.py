"""The options that commands share, and what they stand for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from memplan.architecture import Architecture
from memplan.catalog import architecture_of
from memplan.errors import InputError
from memplan.fields import Flag
from memplan.generation import CACHES, DYNAMIC, GENERATED_TOKENS, GREEDY, SAMPLINGS
from memplan.gpu import Gpu, find_gpu
from memplan.inference import ADAPTERS, SEPARATE, Inference
from memplan.model_source import read_config
from memplan.recipe import (
    Printed,
    Recipe,
    field_names,
    parse_option,
    read_printed_text,
    read_recipe_text,
)
from memplan.store import RUNS_FOLDER
from memplan.units import parse_size

if TYPE_CHECKING:
    from memplan.lengths import Lengths

Function = TypeVar("Function", bound=Callable[..., Any])

LARGEST_RECIPE_BYTES = 2**20
"""A recipe file beyond this is some other file."""

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object and nothing else."
)
runs_folder_option = click.option(
    "--runs",
    "folder",
    metavar="FOLDER",
    default=str(RUNS_FOLDER),
    show_default=True,
    help="Where measured runs are kept.",
)
trust_option = click.option(
    "--trust-remote-code",
    is_flag=True,
    help="Run Python code that the model's repository brings.",
)

lengths_option = click.option(
    "--lengths",
    "lengths_file",
    metavar="FILE",
    help="How long the samples are: JSONL of texts or token counts, or a histogram.",
)


def gpu_options(function: Function) -> Function:
    """The options that say which card, and what of it is kept back."""
    options = (
        click.option("--gpu", "gpu_text", help="A card, a size such as 12GB, or auto."),
        click.option("--reserve", help="Memory kept back, such as 1GiB."),
        click.option("--display", is_flag=True, help="Keep back what a desktop takes."),
        click.option("--context", help="Size of the CUDA context, where known."),
        click.option(
            "--os",
            "os_name",
            type=click.Choice(["linux", "windows", "wsl"]),
            help="Whose driver the card runs under.",
        ),
    )
    return decorated(function, options)


def take_gpu(options: dict[str, Any]) -> Gpu | None:
    """The card of the command's options; None where none is given.

    Takes the card's options out of the command's.
    """
    text = options.pop("gpu_text")
    reserve = options.pop("reserve")
    display = options.pop("display")
    context = options.pop("context")
    os_name = options.pop("os_name")
    if text is None:
        return None
    return find_gpu(
        text,
        reserve_bytes=_size(reserve, "--reserve") or 0,
        display=display,
        context_bytes=_size(context, "--context"),
        os_name=os_name,
    )


def required_gpu(options: dict[str, Any]) -> Gpu:
    """The card likewise; raises InputError where none is given."""
    gpu = take_gpu(options)
    if gpu is None:
        raise InputError(
            "--gpu", "", "is missing", "give a card, a size such as 12GB, or auto"
        )
    return gpu


def asked_architecture(
    model: str | None, named: str | None, *, trust_remote_code: bool
) -> Architecture:
    """The model of the argument, else the one that the recipe's file names."""
    source = read_config(
        model_argument(model, named), trust_remote_code=trust_remote_code
    )
    return architecture_of(source, trust_remote_code=trust_remote_code)


def lengths_of(file: str | None, model: str, keys: dict[str, Any]) -> Lengths | None:
    """The lengths in the file that is named, cut to the sequence that is given.

    `model` is whose tokenizer texts are for.
    """
    if file is None:
        return None
    from memplan.lengths import read_lengths, tokens_of

    found = read_lengths(file, lambda texts: tokens_of(texts, model))
    limit = keys.get("sequence_length")
    if limit is None:
        return found
    return found.cut(Recipe(sequence_length=limit).sequence_length)


def inference_options(function: Function) -> Function:
    """The options that ask for inference in the place of a fine-tune."""
    options = (
        click.option(
            "--inference",
            "asks_inference",
            is_flag=True,
            help="Answer a batch of prompts instead of training; they are as long as "
            "the sequence length.",
        ),
        click.option(
            "--new-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help=f"Tokens of an answer [{GENERATED_TOKENS}].",
        ),
        click.option(
            "--adapters",
            type=click.Choice(ADAPTERS),
            help="Adapters beside the weights, merged into them, or none at all "
            f"[{SEPARATE}].",
        ),
        click.option(
            "--sampling",
            type=click.Choice(SAMPLINGS),
            help="How tokens are chosen: the likeliest, drawn from the likeliest, or "
            f"so with a temperature and top_p as well [{GREEDY}].",
        ),
        click.option(
            "--cache",
            type=click.Choice(CACHES),
            help="Keys and values that grow, or have room for all tokens at once "
            f"[{DYNAMIC}].",
        ),
    )
    return decorated(function, options)


def take_inference(options: dict[str, Any]) -> Inference | None:
    """The inference that the command's options ask for; None where they do not.

    Takes its options out of the command's.
    """
    asked = options.pop("asks_inference")
    new_tokens = options.pop("new_tokens")
    adapters = options.pop("adapters")
    sampling = options.pop("sampling")
    cache = options.pop("cache")
    if not asked:
        given = {
            "--new-tokens": new_tokens,
            "--adapters": adapters,
            "--sampling": sampling,
            "--cache": cache,
        }
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    name, value, "is of inference alone", "give --inference as well"
                )
        return None
    return Inference(
        num_tokens=new_tokens or GENERATED_TOKENS,
        adapters=adapters or SEPARATE,
        sampling=sampling or GREEDY,
        cache=cache or DYNAMIC,
    )


class RecipeCommand(click.Command):
    """A command whose truth values may be given bare: `--padded`, `--no-padded`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spelt_out(args)))


def _spelt_out(args: list[str]) -> Iterator[str]:
    """The arguments with `true` or `false` after each of the recipe's truth values."""
    for index, arg in enumerate(args):
        following = args[index + 1].lower() if index + 1 < len(args) else ""
        if arg in _FLAGS and following not in ("true", "false"):
            yield from (arg, "true")
        elif arg.replace("--no-", "--", 1) in _FLAGS and arg not in _FLAGS:
            yield from (arg.replace("--no-", "--", 1), "false")
        else:
            yield arg


def recipe_options(function: Function) -> Function:
    """`--recipe` and one option for each key of a recipe."""
    file_option = click.option(
        "--recipe",
        "recipe_file",
        help="A recipe file, or - for standard input; options given as well win.",
    )
    return file_option(key_options(function))


def key_options(function: Function) -> Function:
    """One option for each key of a recipe."""
    options = []
    for field in dataclasses.fields(Recipe):
        names = [f"--{field.name.replace('_', '-')}", *_ALIASES.get(field.name, ())]
        options.append(
            click.option(*names, field.name, metavar=_metavar(field), help=_help(field))
        )
    return decorated(function, options)


_ALIASES = {"batch_size": ("--batch",), "sequence_length": ("--seq",)}

_FLAGS = frozenset(
    f"--{field.name.replace('_', '-')}"
    for field in dataclasses.fields(Recipe)
    if isinstance(field.metadata["kind"], Flag)
)


def take_recipe(options: dict[str, Any]) -> tuple[Recipe, str | None]:
    """The recipe of the command's options, and the model that its file names.

    Takes the recipe's options out of the command's.
    """
    settled, model = take_recipe_keys(options)
    return Recipe.from_mapping(settled), model


def take_recipe_keys(options: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The keys that the options give, and the model likewise."""
    file = options.pop("recipe_file")
    keys, model = read_recipe_file(file) if file else ({}, None)
    return keys | take_keys(options), model


def take_keys(options: dict[str, Any]) -> dict[str, Any]:
    """The keys that have options of their own; takes all of these out."""
    given = given_keys(options)
    for name in field_names():
        del options[name]
    return given


def given_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are given as options of their own."""
    return {
        name: parse_option(name, options[name])
        for name in field_names()
        if options[name] is not None
    }


def read_recipe_file(file: str) -> tuple[dict[str, Any], str | None]:
    """The keys in a recipe file and the model it names, if any; `-` is stdin."""
    return read_recipe_text(_read_text(file), "--recipe", file)


def read_printed_file(file: str) -> Printed:
    """What a plan, a recipe file or a printed object says; `-` is stdin."""
    return read_printed_text(_read_text(file, "PLAN"), "PLAN", file)


def model_argument(model: str | None, named: str | None) -> str:
    """The model that is asked for: the argument, else what the recipe file names."""
    if model is None and named is None:
        raise InputError(
            "MODEL",
            "",
            "is missing",
            "give a catalog name, a hub id, a folder or a config.json",
        )
    return model if model is not None else str(named)


def _read_text(file: str, field: str = "--recipe") -> str:
    remedy = "give a readable JSON or YAML file"
    try:
        if file == "-":
            data = sys.stdin.buffer.read(LARGEST_RECIPE_BYTES + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(LARGEST_RECIPE_BYTES + 1)
        if len(data) > LARGEST_RECIPE_BYTES:
            raise InputError(field, file, "is larger than 1 MiB", remedy)
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        problem = f"cannot be read ({reason})"
        raise InputError(field, file, problem, remedy) from error


def decorated(function: Function, options: Any) -> Function:
    """The function with several of click's options, in their order."""
    return functools.reduce(lambda f, option: option(f), reversed(options), function)


def _size(text: str | None, field: str) -> int | None:
    return None if text is None else parse_size(text, field)


def _metavar(field: dataclasses.Field[Any]) -> str:
    return "[true|false]" if isinstance(field.metadata["kind"], Flag) else "VALUE"


def _help(field: dataclasses.Field[Any]) -> str:
    text: str = field.metadata["help"]
    default = field.default
    if isinstance(default, bool):
        return f"{text} [{str(default).lower()}]"
    if isinstance(default, str | int | float):
        return f"{text} [{default}]"
    return text


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Keeps torch's compiler from being loaded for kernels that nothing here calls.

    bitsandbytes compiles two of the CPU's as it is imported; torch leaves that out
    where it is told to (torch._dynamo.eval_frame, `_optimize`).
    """
    before = os.environ.get(_COMPILER)
    os.environ[_COMPILER] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_COMPILER]
        else:
            os.environ[_COMPILER] = before


_COMPILER = "TORCHDYNAMO_DISABLE"
