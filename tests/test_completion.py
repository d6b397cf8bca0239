"""Shells complete commands, options, models, cards and what a recipe's keys take."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from command_line import run, run_process

from memplan import registry
from memplan.commands.completion import SHELLS, cards
from memplan.gpu import find_gpu, gpus
from memplan.model_source import catalog_names


def completed(*words: str) -> list[str]:
    """What is offered for the last word, as bash is told."""
    ran = run_process(
        _MEMPLAN_COMPLETE="bash_complete",
        COMP_WORDS=" ".join(("memplan", *words)),
        COMP_CWORD=str(len(words)),
    )
    assert ran.code == 0, ran.err
    return [line.partition(",")[2] for line in ran.out.splitlines()]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("es",), ["estimate"]),
        (("estimate", "llama-2-7b"), ["meta-llama/Llama-2-7b-hf"]),
        (("fits", "gpt2", "openai-community/gpt2-x"), ["openai-community/gpt2-xl"]),
        (("simulate", "--gpu", "rtx-3060-1"), ["RTX-3060-12GB"]),
        (("plan", "--optimizer", "paged-l"), ["paged-lion-8bit"]),
        (("profile", "--method", "lora-"), ["lora-fa", "lora-plus"]),
        (("estimate", "--quantization", "nf4-d"), ["nf4-double"]),
        (("estimate", "--trainer", "tr"), ["transformers", "trl"]),
        (("simulate", "--new-to"), ["--new-tokens"]),
    ],
)
def test_words_are_completed(words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(*words) == offered


def test_nothing_begun_offers_all() -> None:
    assert completed("estimate", "--method", "") == list(registry.names("methods"))
    assert completed("inspect", "") == catalog_names()


def test_cards_that_are_offered_are_those_of_the_catalog() -> None:
    named = {find_gpu(word).name for word in cards() if word != "auto"}

    assert named == {gpu.name for gpu in gpus()}
    assert not [word for word in cards() if " " in word]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_the_shells(shell: str) -> None:
    ran = run("completion", shell)

    assert ran.code == 0
    assert f"_MEMPLAN_COMPLETE={shell}_complete" in ran.out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=ran.out, text=True, check=True)
