"""Imports point downwards only, and what is heavy is imported behind one wall."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memplan

PACKAGE = Path(memplan.__file__).parent

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("units", "registry", "store", "notebook", "loading"),
    ("addresses",),
    ("fields", "hub", "allocator", "machine"),
    ("architecture", "recipe", "gpu", "footprint", "model_source"),
    ("generation",),
    ("inference",),
    ("life",),
    ("profile", "plan", "simulation", "validation", "kernels", "cublas", "values"),
    ("sorting",),
    ("residuals",),
    ("tape",),
    ("track",),
    ("runs", "grid"),
    ("importers",),
    ("methods", "quantizations", "optimizers", "losses", "models", "results"),
    ("checks", "inspector"),
    ("catalog", "training"),
    ("simulator", "profiler", "lengths"),
    ("tapes",),
    ("estimator",),
    ("batching", "comparison", "fits"),
    ("accuracy",),
    ("callback",),
    ("planner",),
    ("exporters",),
    ("report",),
    ("reporters",),
    ("page",),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
"""The parts of the package from the lowest up; a part may import lower ones only."""

RANKS = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

HEAVY = {
    "accelerate",
    "bitsandbytes",
    "gradio",
    "hqq",
    "optimum",
    "huggingface_hub",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "numpy",
    "peft",
    "pynvml",
    "rich",
    "scipy",
    "torch",
    "transformers",
    "trl",
    "yaml",
}
"""What takes long to import, or need not be installed."""

LIGHT_ENOUGH = {"reporters": {"rich"}, "planner": {"numpy"}}
"""Which heavy packages a part imports all the same whenever it is imported."""

BEHIND_THE_WALL = {"inspector", "training", "simulator", "profiler", "callback"}
"""Parts that import torch when they are imported, so nothing imports them but late."""

BUILDERS = {"methods", "quantizations", "optimizers", "losses", "models"}
"""Parts whose functions build with torch, and import it no sooner."""

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    """The module or folder of the package that a file is or lies in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """The full names that a file imports, each with its statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((f"{node.module}.{alias.name}", node) for alias in node.names)


def at_once(tree: ast.Module) -> set[ast.stmt]:
    """The import statements that run whenever the file is imported."""
    found: set[ast.stmt] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.add(node)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        pending.extend(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    part = part_of(file)
    assert part in RANKS, f"say in LAYERS where {part} stands"
    for name, node in imports(ast.parse(file.read_text())):
        package, _, rest = name.partition(".")
        if package != "memplan" or rest == "__version__":
            continue
        imported = rest.partition(".")[0]
        lower = RANKS[imported] < RANKS[part]

        assert lower or imported == part, f"{file}:{node.lineno} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_heavy_packages_are_imported_late_or_behind_the_wall(file: Path) -> None:
    part = part_of(file)
    if part in BEHIND_THE_WALL or is_imported_late(file):
        return
    tree = ast.parse(file.read_text())
    now = at_once(tree)
    for name, node in imports(tree):
        package = name.partition(".")[0]
        if node in now and package in HEAVY:
            allowed = LIGHT_ENOUGH.get(part, set())

            assert package in allowed, f"{file}:{node.lineno} imports {name} at once"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_torch_is_used_only_by_builders_and_behind_the_wall(file: Path) -> None:
    part = part_of(file)
    if part in BEHIND_THE_WALL | BUILDERS:
        return
    for name, node in imports(ast.parse(file.read_text())):
        package = name.partition(".")[0]

        assert package not in {"torch", "transformers", "peft", "bitsandbytes"}, (
            f"{file}:{node.lineno} imports {name}"
        )


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_what_is_behind_the_wall_is_imported_late(file: Path) -> None:
    part = part_of(file)
    if part in BEHIND_THE_WALL:
        return
    tree = ast.parse(file.read_text())
    now = at_once(tree)
    for name, node in imports(tree):
        parts = name.split(".")
        if node in now and parts[0] == "memplan" and len(parts) > 1:
            assert parts[1] not in BEHIND_THE_WALL, (
                f"{file}:{node.lineno} imports {name} at once"
            )


def is_imported_late(file: Path) -> bool:
    """Whether a builder's file is itself imported only inside functions.

    `models` holds module trees, which are classes of torch's; a shared file of the
    builders may hold one too.
    """
    part = part_of(file)
    if part not in BUILDERS or file.name == "__init__.py":
        return False
    module = ".".join(["memplan", *file.relative_to(PACKAGE).with_suffix("").parts])
    for other in PACKAGE.glob("**/*.py"):
        if part_of(other) in BEHIND_THE_WALL or is_module_tree(other):
            continue
        if is_shared_by_builders(other):
            continue
        tree = ast.parse(other.read_text())
        now = at_once(tree)
        for name, node in imports(tree):
            if node in now and f"{name}.".startswith(f"{module}."):
                return False
    return part == "models" or file.name.startswith("_")


def is_shared_by_builders(file: Path) -> bool:
    """Whether a file is imported late itself, by the test of its own."""
    shared = file.name.startswith("_") and file.name != "__init__.py"
    return shared and part_of(file) in BUILDERS


def is_module_tree(file: Path) -> bool:
    return part_of(file) == "models" and file.name != "__init__.py"


def test_every_layer_s_part_that_exists_is_found() -> None:
    existing = {part_of(file) for file in FILES}

    assert existing <= RANKS.keys()
    assert {"cli", "inspector", "errors", "methods"} <= existing


def test_late_imports_are_told_from_those_at_once() -> None:
    source = (
        "import click\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "try:\n    import yaml\nexcept ImportError:\n    pass\n"
        "def build():\n    import numpy\n"
        "class Own:\n    import rich\n"
    )
    tree = ast.parse(source)
    now = at_once(tree)

    assert {name for name, node in imports(tree) if node in now} == {
        "click",
        "yaml",
        "rich",
    }
