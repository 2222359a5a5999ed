"""Files that ship with the package: the default charter and the example prompts."""

from __future__ import annotations

from pathlib import Path


def path(name: str) -> Path:
    """The path of a shipped file, for example ``charter.yaml``."""
    return Path(__file__).parent / name
