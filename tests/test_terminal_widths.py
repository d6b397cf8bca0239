"""Every command's tables keep within a terminal's width, whole, and are plain piped."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
from small_llama import config_file

LLAMA = "meta-llama/Llama-2-7b-hf"
COMMANDS = {
    "fits": ("fits", "--gpu", "12GB", LLAMA, "openai-community/gpt2"),
    "estimate": ("estimate", LLAMA, "--gpu", "12GB", "--explain"),
    "inference": ("estimate", LLAMA, "--inference", "--gpu", "24GB"),
    "why-not": ("why-not", LLAMA, "--gpu", "8GB"),
}
LISTS = {
    "inspect": ("inspect", LLAMA),
    "models": ("models", "llama"),
    "gpus": ("gpus",),
    "runs": ("runs",),
    "doctor": ("doctor",),
}
TRACED = {
    "simulate": ("simulate", "--gpu", "12GB", "--top", "3"),
    "plan": ("plan", "--gpu", "8GB"),
}

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """What a command writes onto a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", *arguments],
        stdout=follower,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        env=kept | {"TERM": "xterm-256color"} | environment,
    )
    os.close(follower)
    written = b""
    while True:
        try:
            read = os.read(leader, 65536)
        except OSError:
            break
        if not read:
            break
        written += read
    process.wait()
    os.close(leader)
    return written.decode().replace("\r\n", "\n")


def piped(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        capture_output=True,
        check=False,
        text=True,
    )
    return done.stdout


def tokens(text: str) -> set[str]:
    """The figures of a text, which no cell may lose."""
    return set(re.findall(r"\d[\d.,]*\d", text))


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_lines_keep_within_the_screen(arguments: tuple[str, ...], columns: int) -> None:
    check_width(arguments, columns)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("arguments", LISTS.values(), ids=LISTS)
def test_lists_keep_within_the_screen(arguments: tuple[str, ...], columns: int) -> None:
    check_width(arguments, columns)


def check_width(arguments: tuple[str, ...], columns: int) -> None:
    shown = ESCAPE.sub("", on_terminal(columns, *arguments))

    assert shown.strip()
    assert max(map(len, shown.splitlines())) <= columns
    assert "…" not in shown


@pytest.mark.parametrize("name", ["fits", "estimate"])
def test_narrow_tables_lose_no_figure(name: str) -> None:
    arguments = COMMANDS[name]
    narrow = ESCAPE.sub("", on_terminal(80, *arguments))

    lost = tokens(piped(*arguments)) - tokens(narrow)
    joined = re.sub(r"\s", "", narrow)
    assert not [figure for figure in lost if figure not in joined]


def test_no_color_is_heeded_and_pipes_are_plain() -> None:
    arguments = COMMANDS["estimate"]

    # Bold and dim are no colours (no-color.org).
    assert not re.search(
        r"\x1b\[[0-9;]*\b(3[0-7]|4[0-7]|9[0-7]|38|48)\b",
        on_terminal(80, *arguments, NO_COLOR="1"),
    )
    assert "\x1b" not in piped(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("arguments", TRACED.values(), ids=TRACED)
def test_lines_of_what_runs_torch_keep_within_the_screen(
    arguments: tuple[str, ...], columns: int
) -> None:
    command, *options = arguments
    shown = ESCAPE.sub("", on_terminal(columns, command, config_file(), *options))

    assert max(map(len, shown.splitlines())) <= columns
