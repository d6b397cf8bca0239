from __future__ import annotations

import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import time

import click
import pytest
from command_line import run, run_process

import memplan
from memplan import cli
from memplan.errors import InputError, MemplanError

HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "rich", "yaml")


def loaded_after(code: str, **environment: str) -> set[str]:
    """The heavy modules that a program of that code has loaded when it ends."""
    program = (
        "import sys, atexit\n"
        "def tell():\n"
        f"    print(*set(sys.modules) & set({HEAVY!r}), file=sys.stderr)\n"
        f"atexit.register(tell)\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=True,
        env=os.environ | environment,
        text=True,
    )
    return set(done.stderr.split())


def command(*arguments: str) -> str:
    return f"from memplan import cli\nsys.exit(cli.run({list(arguments)!r}))"


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import memplan", set()),
        ("import memplan\nmemplan.Recipe(), memplan.find_gpu('12GB')", set()),
        ("import memplan\nmemplan.inspect('meta-llama/Llama-2-7b-hf')", set()),
        (command("--help"), set()),
        (command("--version"), set()),
        (command("inspect", "--help"), {"rich"}),
        (command("inspect", "meta-llama/Llama-2-7b-hf"), {"rich"}),
        (command("models"), {"rich"}),
        (command("gpus", "--json"), {"rich"}),
    ],
)
def test_nothing_heavy_is_loaded(code: str, allowed: set[str]) -> None:
    assert loaded_after(code) <= allowed


ESTIMATES = (
    ("estimate", "gpt2", "--checkpointing", "full", "--seq", "512", "--gpu", "12GB"),
    ("estimate", "gpt2", "--checkpointing", "full", "--json"),
    ("fits", "gpt2", "--gpu", "12GB", "--method", "lora", "--quantization", "none"),
)


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user for whom these models were estimated before."""
    environment = {"MEMPLAN_CACHE": str(tmp_path_factory.mktemp("cache"))}
    for arguments in ESTIMATES[1:]:
        assert run_process(*arguments, **environment).code == 0
    return environment


@pytest.mark.parametrize("arguments", ESTIMATES, ids=" ".join)
def test_known_models_are_estimated_without_anything_heavy(
    known: dict[str, str], arguments: tuple[str, ...]
) -> None:
    assert loaded_after(command(*arguments), **known) <= {"rich"}


def test_inspecting_a_config_loads_torch() -> None:
    """So that the tests above cannot pass by looking at the wrong place."""
    code = "from memplan import inspector"

    assert {"torch", "transformers"} <= loaded_after(code)


def seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=True)
    return time.perf_counter() - started


def test_help_takes_a_tenth_of_a_second_more_than_importing_click() -> None:
    """The middle of a few pairs, one right after the other, so that load cancels."""
    for _ in range(3):
        over = statistics.median(
            seconds("-m", "memplan", "--help") - seconds("-c", "import click")
            for _ in range(7)
        )
        if over < 0.1:
            return
    pytest.fail(f"--help takes {over:.2f} s more than importing click")


def test_help_lists_every_command_with_its_line() -> None:
    ran = run("--help")

    assert ran.code == 0
    for name, line in cli.COMMANDS.items():
        assert f"{name} " in ran.out
        assert line in ran.out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_line_of_help_is_the_command_s_own(name: str) -> None:
    with click.Context(cli.group) as context:
        loaded = cli.group.get_command(context, name)

    assert loaded is not None
    assert loaded.get_short_help_str(200) == cli.COMMANDS[name]


def test_python_m_memplan_is_the_command_line() -> None:
    ran = run_process("--version")

    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"memplan, version {memplan.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspct"], "command: 'inspct' is unknown; near: inspect"),
        (["bogus"], "command: 'bogus' is unknown; near: "),
        (["--bogus"], "No such option"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["models", "--family", "lama"], "--family: 'lama' is unknown; near: llama"),
        (["gpus", "--min-memory", "12"], "has no unit"),
        (["inspect", "no-such-model"], "model: 'no-such-model' is unknown"),
        (["schema", "bogus"], "'bogus' is not one of"),
        (["simulate"], "MODEL: '' is missing"),
        (["estimate"], "MODEL: '' is missing"),
        (["fits"], "--gpu: '' is missing"),
        (["compare", "gpt2"], "--recipe: '' is but one side"),
        (["simulate", "gpt2", "--method", "lorra"], "method: 'lorra' is unknown; near"),
        (["simulate", "gpt2", "--rank", "0"], "rank: 0 is below 1"),
        (["simulate", "gpt2", "--gpu", "rtx9090"], "--gpu: 'rtx9090' is unknown; near"),
        (["simulate", "gpt2", "--gpu", "12"], "--gpu: '12' has no unit"),
        (["simulate", "gpt2", "--recipe", "none"], "--recipe: 'none' cannot be read"),
    ],
)
def test_bad_input_is_exit_2_with_stdout_empty(arguments: list[str], said: str) -> None:
    ran = run(*arguments)

    assert (ran.code, ran.out) == (2, "")
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (InputError("rank", 0, "is below 1", "raise it"), 2, "memplan: rank: 0 is"),
        (MemplanError("a footprint without moments"), 3, "memplan: a footprint"),
        (
            ZeroDivisionError("x\ny"),
            3,
            "memplan: internal error: ZeroDivisionError: x ",
        ),
        (KeyboardInterrupt(), 130, "memplan: interrupted"),
        (click.Abort(), 130, "memplan: interrupted"),
        (RecursionError(), 3, "internal error: RecursionError: no message"),
    ],
)
def test_what_goes_wrong_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr("memplan.commands.models.catalog_models", fail)

    ran = run("models")

    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_traceback_is_shown_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_TRACEBACK", "1")
    monkeypatch.setattr("memplan.commands.models.catalog_models", lambda: 1 / 0)

    ran = run("models")

    assert ran.code == 3
    assert "in command\n" in ran.err


def test_exit_code_is_what_a_command_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.group, "invoke", lambda _: 1)

    assert run("models").code == 1


@pytest.mark.parametrize("arguments", [["models"], ["models", "--json"]])
def test_reader_that_goes_away_is_no_error(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()

    assert process.wait(timeout=60) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_interrupt_is_exit_130() -> None:
    code = (
        "import os, signal, memplan.commands.models as m\n"
        # A job in the background is started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "m.catalog_models = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "from memplan import cli; import sys; sys.exit(cli.run(['models']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, text=True
    )

    assert done.returncode == 128 + signal.SIGINT
    assert (done.stdout, done.stderr) == ("", "memplan: interrupted\n")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux")
def test_name_that_is_no_text_can_be_shown(tmp_path: os.PathLike[str]) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"\xff")
    os.mkdir(folder)
    with open(os.path.join(folder, b"config.json"), "w") as file:
        file.write('{"model_type": "gpt2", "n_layer": 1}')

    ran = run_process("inspect", os.fsdecode(folder))

    assert (ran.code, ran.err) == (0, "")
    assert "udcff" in ran.out


def on_a_terminal(columns: int, *arguments: str, **environment: str) -> str:
    """What a command shows on a terminal of that width, escapes included."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "memplan", *arguments],
        stdout=follower,
        stderr=follower,
        env=os.environ | {"TERM": "xterm", "COLUMNS": str(columns)} | environment,
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            read = os.read(leader, 65536)
        except OSError:
            break
        shown += read
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return shown.decode().replace("\r\n", "\n")


BOLD = "\x1b[1m"

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
"""What a terminal does not show: colours, and the moves of a line of progress."""


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize(
    "arguments",
    [
        ["models", "llama"],
        ["gpus"],
        ["inspect", "openai/gpt-oss-20b"],
        ["--help"],
        ["estimate", "gpt2", "--checkpointing", "full", "--gpu", "12GB", "--explain"],
        ["fits", "gpt2", "--gpu", "12GB", "--method", "lora", "--quantization", "none"],
    ],
)
def test_no_line_is_wider_than_the_terminal(
    columns: int, arguments: list[str], known: dict[str, str]
) -> None:
    shown = on_a_terminal(columns, *arguments, NO_COLOR="1", **known)

    lines = [ESCAPE.sub("", line) for line in shown.splitlines()]
    assert max(map(len, lines)) <= columns
    assert "…" not in shown


def test_terminal_shows_rules_and_pipe_shows_plain_columns() -> None:
    drawn = on_a_terminal(80, "gpus", "T4")
    plain = run_process("gpus", "T4").out

    assert "───" in drawn
    assert BOLD in drawn
    assert "───" not in plain
    assert "\x1b" not in plain
    assert (
        plain.splitlines()[0].split()
        == drawn.splitlines()[0].replace(BOLD, "").replace("\x1b[0m", "").split()
    )


def test_no_color_is_heeded() -> None:
    coloured = "\x1b[3"

    assert coloured not in on_a_terminal(80, "gpus", "T4", NO_COLOR="1")
