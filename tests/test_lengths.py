"""Files of lengths, each against the list of samples that it stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memplan.errors import InputError
from memplan.lengths import Lengths, read_lengths, tokens_of


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def read(tmp_path: Path, text: str) -> Lengths:
    file = tmp_path / "lengths"
    file.write_text(text)
    return read_lengths(str(file), words)


def lines(*values: Any) -> str:
    return "".join(f"{json.dumps(value)}\n" for value in values)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        (lines(7, 3, 7), {3: 1, 7: 2}),
        (lines([3, 7, 7]), {3: 1, 7: 2}),
        (lines("a b c", "one"), {1: 1, 3: 1}),
        (lines({"text": "a b", "id": 4}, {"text": "a"}), {1: 1, 2: 1}),
        (lines({"prompt": "a b ", "completion": "c"}), {3: 1}),
        (lines({"length": 9}, {"num_tokens": 9}, {"tokens": 8}), {8: 1, 9: 2}),
        (lines({"length": 9, "count": 5}), {9: 5}),
        (lines({"input_ids": [5, 6, 7]}, {"input_ids": [5]}), {1: 1, 3: 1}),
        (lines({"512": 10, "64": 3, "128": 0}), {64: 3, 512: 10}),
        (json.dumps({"512": 10, "64": 3}, indent=2), {64: 3, 512: 10}),
        (lines([[512, 10], [64, 3]]), {64: 3, 512: 10}),
        (lines([512, 10], [64, 3], [1, 1]), {1: 1, 64: 3, 512: 10}),
        ("\ufeff4\n\n5\n", {4: 1, 5: 1}),
    ],
)
def test_every_form_is_read(tmp_path: Path, text: str, counts: dict[int, int]) -> None:
    assert dict(read(tmp_path, text).counts) == counts


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no samples"),
        ("{}\n{}", "line 1"),
        (lines({"64": 0}), "holds no samples"),
        (lines(4, 0), "line 2"),
        (lines(4, -3), "-3"),
        (lines(4, 2.5), "2.5"),
        (lines(4, True), "True"),
        (lines(4, None), "None"),
        ("4\nfive\n", "line 2"),
        (lines(2**31), "2147483648"),
        (lines({"length": "many"}, 4), "'many'"),
        (lines({"messages": []}, 4), "messages"),
        (lines({"input_ids": []}, 4), "line 1"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=r"--lengths: .*histogram") as caught:
        read(tmp_path, text)

    assert said in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read"):
            read_lengths(str(file), words)


SAMPLES = [1] * 50 + [10] * 49 + [400]
LENGTHS = Lengths(counts=((1, 50), (10, 49), (400, 1)))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.51, 0.9, 0.99, 0.991, 1.0])
def test_percentile_is_that_of_the_sorted_samples(share: float) -> None:
    within = LENGTHS.percentile(share)
    exceeding = sum(sample > within for sample in SAMPLES) / len(SAMPLES)
    shorter = sum(sample < within for sample in SAMPLES) / len(SAMPLES)

    assert exceeding <= 1 - share + 1e-9
    assert shorter < share


def test_sums_are_those_of_the_samples() -> None:
    assert LENGTHS.num_samples == len(SAMPLES)
    assert LENGTHS.num_tokens == sum(SAMPLES)
    assert LENGTHS.longest == max(SAMPLES)
    assert LENGTHS.longest_tokens(3) == sum(sorted(SAMPLES)[-3:])
    assert LENGTHS.covered(10) == 0.99
    assert LENGTHS.covered(9) == 0.5


def test_cut_samples_end_at_the_limit() -> None:
    cut = LENGTHS.cut(8)

    assert cut.counts == ((1, 50), (8, 50))
    assert LENGTHS.cut(400) == LENGTHS


def test_tokens_are_those_of_the_model_s_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    for model in (tmp_path, tmp_path / "config.json"):
        assert tokens_of(["a b a", "c"], str(model)) == [3, 1]


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(InputError, match="give token counts instead"):
        tokens_of(["a"], str(tmp_path))
