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
    assert printed["inference"] == {
        "new_tokens": 256,
        "adapters": "none",
        "sampling": "greedy",
        "cache": "dynamic",
    }
    labels = [moment["label"] for moment in printed["moments"]]
    assert labels == ["load", "prefill", "decode"]
    total = printed["peak"]["reserved_bytes"]
    assert sum(printed["breakdown"].values()) == total


def test_estimate_prints_terms_and_what_still_fits() -> None:
    ran = run(
        "estimate",
        "meta-llama/Llama-2-7b-hf",
        "--inference",
        "--gpu",
        "12GB",
        "--quantization",
        "nf4-double",
        "--explain",
    )

    assert ran.code == 0, ran.err
    assert "256 each answered" in ran.out
    assert "32 layers x 512 tokens x 16,384 B" in ran.out
    assert "Still fit: batches of" in ran.out


@pytest.mark.parametrize(
    ("model", "option", "words"),
    [
        # Each r (i + o): four of attention; 8 experts' two stacks, the joined one with
        # twice the rank; and the router.
        (
            "mistralai/Mixtral-8x7B-v0.1",
            "--explain",
            f"{32 * 16 * (26624 + 8 * (2 * 32768 + 18432) + 4104):,} numbers x 4 B",
        ),
        ("meta-llama/Llama-2-7b-hf", "--cache=static", "disable_compile=True"),
    ],
)
def test_estimate_answers_of_experts_and_into_a_static_cache(
    model: str, option: str, words: str
) -> None:
    ran = run("estimate", model, "--inference", "--gpu", "H200", option)

    assert ran.code == 0, ran.err
    assert words in " ".join(ran.out.split())


def test_estimate_prints_one_object() -> None:
    ran = run(
        "estimate", "openai-community/gpt2", "--inference", "--gpu", "12GB", "--json"
    )

    printed = json.loads(ran.out)
    assert printed["kind"] == "estimate"
    assert printed["inference"] == {
        "new_tokens": 256,
        "adapters": "separate",
        "sampling": "greedy",
        "cache": "dynamic",
    }
    assert sum(printed["breakdown"].values()) == printed["peak"]["device_bytes"]
    assert printed["breakdown"]["kv_cache"] > 0
    assert printed["limits"]["largest_batch_size"] > 1


def test_what_does_not_fit_exits_with_one() -> None:
    ran = run("estimate", "meta-llama/Llama-2-70b-hf", "--inference", "--gpu", "12GB")

    assert ran.code == 1
    assert "Does not fit" in ran.out


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
