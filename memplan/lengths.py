"""`Lengths`: how long the samples of a data set are, in tokens."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from memplan.errors import InputError, MissingExtraError, shown
from memplan.fields import LARGEST_INTEGER

FIELD = "--lengths"

TEXT_KEYS = ("text", "content")
COUNT_KEYS = ("length", "num_tokens", "tokens")
"""Keys of a line that hold a sample's text, or how many tokens it has."""

_REMEDY = (
    'give JSONL of numbers, texts or objects with "length", "input_ids" or "text", or '
    'a histogram such as {"512": 900, "2048": 10}'
)

Tokenize = Callable[[Sequence[str]], Sequence[int]]
"""How many tokens each text has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """How many samples there are of each length."""

    counts: tuple[tuple[int, int], ...]
    """Tokens of a sample, rising, and how many samples have so many."""

    @property
    def num_samples(self) -> int:
        return sum(count for _, count in self.counts)

    @property
    def num_tokens(self) -> int:
        return sum(length * count for length, count in self.counts)

    @property
    def longest(self) -> int:
        return self.counts[-1][0]

    @property
    def mean(self) -> float:
        return self.num_tokens / self.num_samples

    @property
    def differ(self) -> bool:
        """Whether a batch of several samples may need padding."""
        return len(self.counts) > 1

    def percentile(self, share: float) -> int:
        """The least length that no more than 1 - share of the samples exceed."""
        wanted = math.ceil(share * self.num_samples)
        seen = 0
        for length, count in self.counts:
            seen += count
            if seen >= wanted:
                return length
        return self.longest

    def covered(self, length: int) -> float:
        """The share of samples that are no longer than that."""
        within = sum(count for tokens, count in self.counts if tokens <= length)
        return within / self.num_samples

    def longest_tokens(self, num_samples: int) -> int:
        """Tokens of so many of the longest samples together."""
        left, total = num_samples, 0
        for length, count in reversed(self.counts):
            taken = min(left, count)
            total += taken * length
            left -= taken
        return total

    def cut(self, length: int) -> Lengths:
        """The lengths where longer samples are cut to that."""
        counts: Counter[int] = Counter()
        for tokens, count in self.counts:
            counts[min(tokens, length)] += count
        return Lengths(counts=tuple(sorted(counts.items())))

    def to_json(self) -> dict[str, Any]:
        """The lengths as output shows them."""
        return {
            "samples": self.num_samples,
            "tokens": self.num_tokens,
            "mean": round(self.mean, 1),
            "p50": self.percentile(0.5),
            "p99": self.percentile(0.99),
            "max": self.longest,
        }


def read_lengths(file: str, tokenize: Tokenize) -> Lengths:
    """The lengths in a file, or in standard input where it is `-`.

    A line is a number of tokens, a text, or an object that holds either, with `count`
    where it stands for several samples; or the file is a histogram, an object of counts
    by length or a list of pairs. Raises InputError for anything else.
    """
    lines = [line for line in _lines(file) if line.strip()]
    counts: Counter[int] = Counter()
    texts: list[str] = []
    for where, value in _values(file, lines):
        for length, count in _samples(where, value, texts):
            counts[length] += count
    if texts:
        counts.update(tokenize(texts))
    found = tuple(sorted((length, n) for length, n in counts.items() if n))
    if not found:
        raise InputError(FIELD, file, "holds no samples", _REMEDY)
    return Lengths(counts=found)


def _lines(file: str) -> list[str]:
    try:
        with contextlib.ExitStack() as stack:
            data = (
                sys.stdin.buffer
                if file == "-"
                else stack.enter_context(open(file, "rb"))
            )
            return data.read().decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(FIELD, file, f"cannot be read ({reason})", _REMEDY) from error


def _values(file: str, lines: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """What the lines hold, each with its place; else what the whole file holds."""
    try:
        whole = json.loads("\n".join(lines)) if lines else None
    except (ValueError, RecursionError):
        whole = None
    if isinstance(whole, list):
        for number, value in enumerate(whole, 1):
            yield f"{file}, entry {number}", value
        return
    if whole is not None:
        yield file, whole
        return
    for number, line in enumerate(lines, 1):
        where = f"{file}, line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(FIELD, where, "is not JSON", _REMEDY) from error


def _samples(where: str, value: Any, texts: list[str]) -> Iterator[tuple[int, int]]:
    """Lengths and counts that a value stands for; its texts are added to the list."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, list) and len(value) == 2:
        yield _whole(where, value[0], 1), _whole(where, value[1], 0)
    elif isinstance(value, Mapping) and _is_histogram(value):
        for length, count in value.items():
            yield _whole(where, int(length), 1), _whole(where, count, 0)
    elif isinstance(value, Mapping):
        yield from _sample(where, value, texts)
    else:
        yield _whole(where, value, 1), 1


def _sample(
    where: str, value: Mapping[str, Any], texts: list[str]
) -> Iterator[tuple[int, int]]:
    """The length of a sample, or its text."""
    count = _whole(where, value.get("count", 1), 0)
    if isinstance(value.get("input_ids"), list):
        yield _whole(where, len(value["input_ids"]), 1), count
        return
    for key in COUNT_KEYS:
        if key in value:
            yield _whole(where, value[key], 1), count
            return
    found = [value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)]
    if isinstance(value.get("prompt"), str) and isinstance(
        value.get("completion"), str
    ):
        found.append(value["prompt"] + value["completion"])
    if not found:
        keys = ", ".join(map(str, value)) or "nothing"
        raise InputError(
            FIELD, where, f"has neither a length nor a text, but {keys[:80]}", _REMEDY
        )
    texts.extend(found[:1] * count)


def _is_histogram(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(_is_digits(key) for key in value)


def _is_digits(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= 12


def _whole(where: str, value: Any, least: int) -> int:
    """A whole number from `least` on, within what a sequence may have."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not least <= value <= LARGEST_INTEGER:
        problem = f"holds {shown(value)}, which is no count of {least} or more"
        raise InputError(FIELD, where, problem, _REMEDY)
    return int(value)


def tokens_of(texts: Iterable[str], model: str) -> list[int]:
    """How many tokens a model's tokenizer makes of each text.

    Raises MissingExtraError without transformers, InputError where no model is named or
    its tokenizer cannot be read.
    """
    if not model:
        raise InputError(
            FIELD,
            "texts",
            "need the tokenizer of a model, and none is named",
            "name a MODEL, or give token counts",
        )
    try:
        from memplan.training import tokens
    except ModuleNotFoundError as error:
        needed_for = f"{FIELD} with texts (token counts need nothing)"
        raise MissingExtraError(
            needed_for, error.name or "transformers", "torch"
        ) from error
    return tokens.count(texts, model)
