"""Runs memplan's command line, in this process or in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass

from memplan import cli


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command returned and said."""

    code: int
    out: str
    err: str


def run(*arguments: str, stdin: str = "") -> Ran:
    """Runs in this process, its output plain as if piped."""
    out, err = io.StringIO(), io.StringIO()
    standard_input = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.run(list(arguments))
    finally:
        sys.stdin = standard_input
    return Ran(code, out.getvalue(), err.getvalue())


def run_process(*arguments: str, **environment: str) -> Ran:
    """Runs as `python -m memplan` does."""
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        capture_output=True,
        check=False,
        env=os.environ | environment,
        text=True,
        timeout=120,
    )
    return Ran(done.returncode, done.stdout, done.stderr)
