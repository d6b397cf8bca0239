"""A run in a process of its own: however that ends, what was finished is kept."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command_line import run as run_command
from small import LLAMA, task

from memplan import profiler, runs
from memplan.errors import InputError, MeasurementError
from memplan.recipe import Recipe

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MEMPLAN_CACHE": "off"}

MOMENT = {
    "event": "moment",
    "label": "1.forward",
    "allocated_bytes": 7,
    "reserved_bytes": 9,
    "end_allocated_bytes": 5,
    "counters": {"retries": 0},
}
OK = {"event": "outcome", "status": "ok", "message": ""}
BEGIN = {"event": "begin", "label": "1.backward"}


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has a process of the given end stand in for the one that measures."""

    def stand_in(events: list[dict[str, Any]], end: str = "") -> None:
        lines = "".join(json.dumps(event) + "\n" for event in events)
        program = (
            "import os, signal, sys, time\n"
            f"with open(sys.argv[1], 'a') as f: f.write({lines!r})\n{end}\n"
        )

        def start(task: Any, journal: Path, output: Any) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-c", program, str(journal)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

        monkeypatch.setattr(profiler, "_start", start)

    return stand_in


def test_moments_of_a_label_are_one_and_keep_their_worst(child: Any) -> None:
    worse = MOMENT | {"allocated_bytes": 8, "reserved_bytes": 8, "counters": {}}
    child([MOMENT, worse, {"event": "step", "seconds": 0.5, "loss": 2.0}, OK])
    run = profiler.run_task(task(), "one")

    assert run.footprint is not None
    (moment,) = run.footprint.moments
    assert (moment.allocated_bytes, moment.reserved_bytes) == (8, 9)
    assert (run.outcome, run.step_seconds, run.losses) == ("ok", (0.5,), (2.0,))


def test_measuring_is_a_verb_of_an_architecture_and_a_recipe(child: Any) -> None:
    from memplan.catalog import inspect

    child([MOMENT, OK])
    run = profiler.measure(
        inspect("openai-community/gpt2"), Recipe(rank=3), device="cpu"
    )
    child([MOMENT], "os.kill(os.getpid(), signal.SIGKILL)")

    assert (run.model, run.recipe.rank, run.device) == (
        *("openai-community/gpt2", 3),
        "cpu",
    )
    with pytest.raises(MeasurementError, match="SIGKILL"):
        profiler.measure(inspect("openai-community/gpt2"), Recipe(), device="cpu")


def test_a_killed_process_is_said_to_be_and_its_moments_are_kept(child: Any) -> None:
    child([MOMENT, BEGIN], "os.kill(os.getpid(), signal.SIGKILL)")
    run = profiler.run_task(task(), "one")

    assert run.outcome == "killed"
    assert "SIGKILL in 1.backward" in run.message
    assert "out of memory" in run.message
    assert run.footprint is not None
    assert run.footprint.failed_moment == "1.backward"
    with pytest.raises(MeasurementError, match="SIGKILL"):
        profiler.raise_outcome(run)


def test_a_process_that_fails_before_it_can_say_so_is_quoted(child: Any) -> None:
    child([], "print('no such module'); sys.exit(7)")
    run = profiler.run_task(task(), "one")

    assert (run.outcome, run.footprint) == ("failed", None)
    assert run.message == "exit code 7: no such module"


def test_out_of_memory_is_an_outcome(child: Any) -> None:
    words = "CUDA out of memory. Tried to allocate 2.00 GiB."
    child([MOMENT, BEGIN, OK | {"status": "out-of-memory", "message": words}])
    run = profiler.run_task(task(), "one")

    assert (run.outcome, run.message) == ("out-of-memory", words)
    profiler.raise_outcome(run)


def test_a_refusal_is_raised_in_the_child_s_words(child: Any) -> None:
    child([OK | {"status": "refused", "message": "rank: 0 is small; give more"}])

    with pytest.raises(InputError, match=r"^rank: 0 is small; give more$"):
        profiler.run_task(task(), "one")


def test_a_run_that_takes_too_long_is_stopped(
    child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "GRACE_SECONDS", 0.0)
    child([MOMENT, BEGIN], "time.sleep(60)")
    run = profiler.run_task(task(), "one", time_limit=0.5)

    assert (run.outcome, run.message) == ("timed-out", "stopped in 1.backward")


def test_ctrl_c_gives_what_was_finished(child: Any) -> None:
    child([MOMENT, BEGIN], "time.sleep(60)")

    def press(label: str) -> None:
        if label == "1.backward":
            raise KeyboardInterrupt

    with pytest.raises(profiler.Interrupted) as caught:
        profiler.run_task(task(), "one", progress=press)

    assert caught.value.run.outcome == "interrupted"
    assert caught.value.run.footprint is not None


def test_names_differ_by_what_a_run_depends_on_and_by_nothing_else() -> None:
    def name(card: str = "cpu", **fields: Any) -> str:
        return profiler.name_of(task(**fields), card, {"torch": "2.13"})

    assert name() == name(seconds=3.0, folder="x", trace="y")
    others = {name(), name("H100"), name(seed=1), name(recipe={"rank": 5})}
    assert len(others | {profiler.name_of(task(), "cpu", {"torch": "2.14"})}) == 5


@pytest.fixture
def model(tmp_path: Path) -> str:
    file = tmp_path / "small.json"
    file.write_text(json.dumps(dict(LLAMA)))
    return str(file)


OPTIONS = ("--rank", "4", "--seq", "16", "--steps", "2", "--device", "cpu")


def command_of(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "memplan", "profile", *arguments]


def test_the_command_measures_in_a_process_of_its_own(
    model: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        command_of(model, *OPTIONS, "--out", str(tmp_path / "runs"), "--json"),
        capture_output=True,
        check=False,
        env=ENVIRONMENT,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert (printed["kind"], printed["fits"]) == ("measurement", None)
    (run,) = runs.load(tmp_path / "runs")
    assert printed["run"] == run.id
    assert printed["peak"]["allocated_bytes"] > 100_000
    assert run.parameters["trainable"] > 0


def test_out_of_memory_exits_with_one_and_prints_the_run(
    child: Any, model: str, tmp_path: Path
) -> None:
    child([MOMENT, BEGIN, OK | {"status": "out-of-memory", "message": "no memory"}])
    ran = run_command("profile", model, *OPTIONS, "--out", str(tmp_path), "--json")

    assert ran.code == 1
    assert json.loads(ran.out)["outcome"]["status"] == "out-of-memory"


def test_a_killed_run_exits_with_three_and_is_kept(
    child: Any, model: str, tmp_path: Path
) -> None:
    child([MOMENT], "os.kill(os.getpid(), signal.SIGKILL)")
    ran = run_command("profile", model, *OPTIONS, "--out", str(tmp_path / "runs"))

    assert (ran.code, ran.out) == (3, "")
    assert "SIGKILL" in ran.err
    assert [run.outcome for run in runs.load(tmp_path / "runs")] == ["killed"]


def test_a_full_disk_exits_with_two_and_says_so(
    child: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child([MOMENT, BEGIN, OK])
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.is_relative_to(tmp_path / "runs"):
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    ran = run_command("profile", model, *OPTIONS, "--out", str(tmp_path / "runs"))

    assert (ran.code, ran.out) == (2, "")
    assert "No space left on device" in ran.err
    assert runs.load(tmp_path / "runs") == ()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    ran = run_command("profile", model, *OPTIONS, "--out", str(tmp_path / "file" / "x"))

    assert (ran.code, ran.out) == (2, "")
    assert "--out" in ran.err


def test_a_cpu_has_no_trace(model: str, tmp_path: Path) -> None:
    ran = run_command("profile", model, *OPTIONS, "--trace", "--out", str(tmp_path))

    assert (ran.code, ran.out) == (2, "")
    assert "--trace" in ran.err


def write_grid(folder: Path, model: str, ranks: list[int]) -> str:
    file = folder / "grid.json"
    recipe = {"sequence_length": 16}
    content = {"model": model, "recipe": recipe, "runs": [{"vary": {"rank": ranks}}]}
    file.write_text(json.dumps(content))
    return str(file)


def test_a_grid_goes_on_after_trouble_and_measures_no_run_twice(
    child: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(tmp_path, model, [1, 2, 3])
    arguments = ("--grid", grid, "--device", "cpu", "--out", str(tmp_path / "runs"))
    child([MOMENT, BEGIN, OK | {"status": "out-of-memory", "message": "no memory"}])
    first = run_command("profile", *arguments)
    child([MOMENT], "os.kill(os.getpid(), signal.SIGKILL)")
    second = run_command("profile", *arguments)

    assert (first.code, second.code) == (0, 0)
    assert first.out == second.out
    assert first.out.count("out-of-memory") == 3

    third = run_command("profile", *arguments, "--steps", "5")
    assert third.code == 3
    assert "3 of the grid's 3 runs" in third.err
    child([MOMENT, OK])
    assert run_command("profile", *arguments, "--steps", "5").code == 0


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] != "Z"


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ends_with_its_parent(model: str, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        command_of(model, *OPTIONS, "--out", str(tmp_path / "runs")),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = wait_for(lambda: children_of(parent.pid))
    # The child listens once its imports are done.
    parent.kill()
    parent.wait()

    assert wait_for(lambda: not any(map(is_running, found)), seconds=60)
    assert runs.load(tmp_path / "runs") == ()


def wait_for(condition: Any, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    pytest.fail("waited in vain")


@pytest.mark.slow
def test_a_sweep_killed_at_twenty_random_moments_loses_no_finished_run(
    model: str, tmp_path: Path
) -> None:
    """What is finished stays as it is, byte by byte, until the sweep is done."""
    grid = write_grid(tmp_path, model, [1, 2, 3])
    out = tmp_path / "runs"
    command = command_of(
        *("--grid", grid, "--device", "cpu", "--steps", "2", "--out", str(out))
    )
    finished: dict[Path, bytes] = {}
    moments = random.Random(0)
    for _ in range(20):
        sweep = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.2, 12.0))
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
        assert all(file.read_bytes() == held for file, held in finished.items())
        finished |= {file: file.read_bytes() for file in out.glob("*/*.json")}
        assert all(run.outcome == "ok" for run in runs.load(out))
    done = subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)

    assert done.stdout.count(b" ok") == 3
    assert len(runs.load(out)) == 3
    assert all(file.read_bytes() == held for file, held in finished.items())
    assert not list(out.glob("**/.*"))
