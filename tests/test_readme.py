"""The README shows what memplan really prints.

`UPDATE_README=1 pytest tests/test_readme.py` writes the real output into it.
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
from command_line import run_process

import memplan
from memplan import cli

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
TEXT = README.read_text()

BLOCK = re.compile(r"```console\n(.*?)```", re.DOTALL)
SESSION = re.compile(r"^\$ (memplan .*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
"""A command of memplan's, and the lines up to the next command."""

SESSIONS = [
    session for block in BLOCK.findall(TEXT) for session in SESSION.findall(block)
]


def printed(command: str) -> str:
    """What a command prints, without spaces at the ends of its lines."""
    ran = run_process(*shlex.split(command)[1:])
    assert ran.code in (0, 1), ran.err
    return "".join(f"{line.rstrip()}\n" for line in ran.out.splitlines())


@pytest.mark.parametrize(("command", "shown"), SESSIONS, ids=lambda text: text[:40])
def test_command_prints_what_is_shown(command: str, shown: str) -> None:
    out = printed(command)

    if os.environ.get("UPDATE_README"):
        session = f"$ {command}\n"
        updated = README.read_text().replace(session + shown, session + out, 1)
        README.write_text(updated)
    else:
        assert out == shown


def test_there_are_sessions_to_run() -> None:
    assert len(SESSIONS) >= 3
    assert TEXT.index("```console") < TEXT.index("## Install")


def test_the_two_commands_are_those_of_the_design() -> None:
    assert "$ pip install -e . && memplan fits --gpu 12GB\n" in TEXT
    assert '$ pip install -c constraints.txt -e ".[test]" && pytest\n' in TEXT


def test_every_command_is_named_and_no_other() -> None:
    named = set(re.findall(r"`memplan ([a-z-]+)", TEXT))

    assert named == set(cli.COMMANDS)


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

    exec(example, {})

    total, budget, tokens, peak = map(int, capsys.readouterr().out.split())
    card = memplan.find_gpu("RTX 3060")
    assert (total, tokens) == (6_738_415_616, 2 * 512)
    assert budget == card.budget_bytes - 2**30
    assert peak > total / 2


def tree() -> dict[str, str]:
    """The paths that the README's tree of files names, each with its phrase."""
    section = TEXT.split("## What each file is")[1]
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)[:1]
    found, folder = {}, ""
    for line in block.splitlines():
        name, _, phrase = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name
        found[folder + name if line.startswith(" ") else name] = phrase.strip()
    return found


def test_tree_names_what_is_there_and_nothing_else() -> None:
    package = {
        f"memplan/{path.name}{'/' if path.is_dir() else ''}"
        for path in (REPOSITORY / "memplan").iterdir()
        if path.name != "__pycache__"
    }

    named = tree()

    assert {path for path in named if path.startswith("memplan/")} - {"memplan/"} == (
        package
    )
    for path, phrase in named.items():
        assert (REPOSITORY / path).exists(), path
        assert phrase or path == "memplan/", path


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (REPOSITORY / target).exists(), target
