"""Checkpoints that survive a kill: each is marked once it is whole on disk, and unmarked ones are deleted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from charter.errors import StorageError

MARKER = "complete"
OWNER = "stage.json"

_REFUSED = re.compile(
    r"No space left|File too large|quota exceeded|Read-only file|PytorchStreamWriter|I/O error|unexpected pos",
    re.IGNORECASE,
)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint with a marker; those without one, half-written by a killed process, are deleted."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / MARKER).exists():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None


def claim(folder: Path, owner: str) -> None:
    """Make ``folder`` belong to the work that ``owner`` identifies; checkpoints of any other work are deleted."""
    record = folder / OWNER
    if record.exists() and record.read_text("utf-8") == owner:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    partial = record.with_suffix(".partial")
    partial.write_text(owner, "utf-8")
    _sync(partial)
    partial.replace(record)
    _sync(folder)


def seconds_until(checkpoint: Path) -> float:
    """Seconds that were trained until a checkpoint, over all processes."""
    try:
        return float(json.loads((checkpoint / MARKER).read_text("utf-8"))["seconds"])
    except (ValueError, KeyError, TypeError):  # the machine went down before the marker's content was on disk
        return 0.0


def tokens_until(checkpoint: Path) -> int:
    """Tokens that were trained on until a checkpoint, as the trainer logged them."""
    history = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))["log_history"]
    return int(max((entry.get("num_tokens", 0) for entry in history), default=0))


class Marker(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint once everything in it is on disk.

    Args:
        before: seconds that earlier processes trained.
    """

    def __init__(self, before: float) -> None:
        self._before = before
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds trained so far, over all processes."""
        return self._before + time.perf_counter() - self._began

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Flush the checkpoint that was just written, then mark it."""
        del control
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        marker = folder / MARKER
        marker.write_text(json.dumps({"seconds": round(self.seconds, 3)}), "utf-8")
        _sync(marker)
        _sync(folder)


@contextlib.contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise when a write is refused into one kind of error.

    Raises:
        StorageError: the disk is full, over quota or read-only.
    """
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch each raise a kind of their own
        if not _REFUSED.search(str(error)):
            raise
        raise StorageError(
            f"A checkpoint cannot be written to {folder}.",
            fix="Free some space or choose another output folder; whole checkpoints are kept.",
        ) from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
