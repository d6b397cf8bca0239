"""`--inference` of the commands: what it says, and what it refuses."""

from __future__ import annotations

import json

import pytest
from command_line import run
from small_llama import config_file


def test_simulate_prints_the_moments_of_inference() -> None:
    ran = run(
        "simulate", config_file(), "--inference", "--new-tokens", "3", "--gpu", "12GB"
    )

    assert ran.code == 0, ran.err
    assert "3 each answered" in ran.out
    assert "kv cache" in ran.out
    assert "decode" in ran.out


def test_simulate_prints_one_object() -> None:
    ran = run("simulate", config_file(), "--inference", "--adapters", "none", "--json")

    printed = json.loads(ran.out)
    assert printed["inference"] == {"new_tokens": 256, "adapters": "none"}
    labels = [moment["label"] for moment in printed["moments"]]
    assert labels == ["load", "prefill", "decode"]
    total = printed["peak"]["reserved_bytes"]
    assert sum(printed["breakdown"].values()) == total


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--new-tokens", "3"), "--inference"),
        (("--adapters", "none"), "--inference"),
        (("--inference", "--life"), "leave out either"),
        (("--inference", "--new-tokens", "0"), "0"),
        (("--inference", "--adapters", "some"), "some"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: tuple[str, ...], words: str) -> None:
    ran = run("simulate", config_file(), *arguments)

    assert ran.code == 2
    assert ran.out == ""
    assert words in ran.err
