"""The model is single-device PyTorch, and imports go one way."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Each may import itself, what stands before it, and nothing after.
LEVELS = (
    ("eve.errors",),
    ("eve.config", "eve.packing", "eve.random", "eve.tokens", "kernels"),
    ("eve.data", "eve.moe"),
    ("eve.model",),
    ("eve.visual_tokenizer",),
    ("eve.objectives", "eve.parallel"),
    ("eve.training", "eve.tasks", "eve.conversion", "eve.planning"),
    ("eve.pretrain", "eve.evaluate", "eve.describe"),
)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


SOURCES = sorted([*(ROOT / "eve").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


@pytest.mark.parametrize("package", ["model", "moe", "visual_tokenizer", "objectives"])
def test_no_distributed_package_is_imported(package: str) -> None:
    paths = list((ROOT / "eve" / package).rglob("*.py"))
    assert paths
    for path in [*paths, *(ROOT / "eve" / f"{leaf}.py" for leaf in ("packing", "random", "tokens"))]:
        for name in imports(path):
            parts = name.split(".")
            assert parts[0] not in ("deepspeed", "megablocks"), f"{path}: {name}"
            assert parts[:2] not in (["torch", "distributed"], ["eve", "parallel"]), f"{path}: {name}"
        assert "torch.distributed" not in path.read_text(), path


def test_a_model_is_built_without_deepspeed() -> None:
    """Nor is it imported by something that the model imports."""
    import subprocess

    code = "import sys, eve.objectives, eve.model; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def level(name: str) -> int | None:
    return next(
        (
            number
            for number, packages in enumerate(LEVELS)
            for package in packages
            if name == package or name.startswith(package + ".")
        ),
        None,
    )


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_one_way(path: Path) -> None:
    own = level(module_of(path))
    if own is None:
        assert module_of(path) == "eve.__init__", f"{path} has no place in LEVELS"
        return
    for name in imports(path):
        other = level(name)
        assert other is None or other <= own, f"{module_of(path)} imports {name}, which stands above it"
