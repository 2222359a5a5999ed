"""Which module may import which, and what a bare import may load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import charter

ROOT = Path(charter.__file__).parent
ORDER = (
    {"errors", "resources"},
    {"document"},
    {"constitution"},
    {"data"},
    {"engine"},
    {"critique", "evaluation"},
    {"train", "guard"},
    {"cli", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "openvino", "openvino_genai", "openai", "matplotlib")


def imported(source: str, package: str) -> set[str]:
    """Top-level parts of charter that a module's source imports, anywhere in it.

    Args:
        source: the module's text.
        package: dotted package that it lies in, for relative imports.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("charter.")} - {"__version__"}


def violations(name: str, imports: set[str]) -> set[str]:
    """The imports that a top-level part must not have: not itself and not of a lower rank."""
    return {other for other in imports if other != name and RANK[other] >= RANK[name]}


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = parts[0]
    assert name in RANK, f"{name} has no place in the order of imports"
    found = imported(path.read_text("utf-8"), ".".join(("charter", *parts[:-1])))
    assert found <= set(RANK), f"not a part of charter: {found - set(RANK)}"
    assert violations(name, found) == set()


def test_package_itself_imports_nothing() -> None:
    assert imported((ROOT / "__init__.py").read_text("utf-8"), "charter") == set()


def test_the_check_sees_every_form_of_import() -> None:
    forms = {
        "import charter.train.trainer": "train",
        "from charter import guard": "guard",
        "from charter.cli import app": "cli",
        "def f():\n    from charter.train import losses": "train",
        "from ..train import losses": "train",
        "from .. import guard": "guard",
    }
    for source, name in forms.items():
        assert imported(source, "charter.engine") == {name}
        assert violations("engine", {name}) == {name}
    assert imported("from . import base\nfrom .base import Engine", "charter.engine") == {"engine"}
    assert violations("train", {"guard"}) == {"guard"}
    assert violations("guard", {"train"}) == {"train"}
    assert violations("train", {"train", "evaluation", "errors"}) == set()


@pytest.mark.parametrize("module", ["charter", "charter.constitution", "charter.data", "charter.engine", "charter.cli"])
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
