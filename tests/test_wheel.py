"""The wheel carries the catalog: memplan works from any folder once it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing but memplan's wheel is installed."""
    built = tmp_path_factory.mktemp("built")
    installed = tmp_path_factory.mktemp("installed")
    build = ["build", "--wheel", "--no-isolation", "--outdir", str(built)]
    subprocess.run(
        [sys.executable, "-m", *build, str(REPOSITORY)], check=True, capture_output=True
    )
    (wheel,) = built.glob("*.whl")
    pip = ["pip", "install", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run(
        [sys.executable, "-m", *pip, str(wheel)], check=True, capture_output=True
    )
    return installed


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """What an installed memplan prints in another folder."""
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *arguments],
        capture_output=True,
        check=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed)},
        text=True,
    )
    return done.stdout


def test_commands_find_the_catalog(installed: Path, tmp_path: Path) -> None:
    code = "import memplan; print(memplan.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        text=True,
    ).stdout
    assert Path(where.strip()).is_relative_to(installed)

    assert "Tesla T4" in run(installed, tmp_path, "gpus")
    llama = run(installed, tmp_path, "inspect", "meta-llama/llama-2-7b-hf", "--json")
    assert json.loads(llama)["parameters"]["total"] == 6_738_415_616


def test_wheel_carries_data_and_no_tests(installed: Path) -> None:
    profiles = installed / "memplan" / "profiles"

    for folder in ("gpus", "architectures"):
        shipped = {file.name for file in (REPOSITORY / "profiles" / folder).iterdir()}
        assert {file.name for file in (profiles / folder).iterdir()} == shipped
    tops = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert tops == {"memplan", "bin"}
