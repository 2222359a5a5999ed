"""Rows of a finished stage as a data set in the field's column names."""

from __future__ import annotations

import shutil
from pathlib import Path

from charter.data import Row, read_jsonl
from charter.errors import RunError
from charter.train import preferences, revisions


def export(run: Path, stage: str, folder: Path) -> int:
    """Write the newest finished execution of a stage with ``Dataset.save_to_disk``.

    ``revisions`` becomes conversational ``prompt``/``completion`` rows for supervised training, ``preferences``
    becomes ``prompt``/``chosen``/``rejected`` with ``probability``; any other stage is written as it is.

    Returns:
        The number of rows.

    Raises:
        RunError: no such stage, or a folder that is there already.
    """
    from datasets import Dataset

    finished = [path.parent for path in (run / "stages" / stage).glob("*/rows.jsonl") if path.parent.suffix == ""]
    if not finished:
        there = sorted(path.name for path in (run / "stages").glob("*") if list(path.glob("*/rows.jsonl")))
        raise RunError(f"{run} has no rows of a stage {stage!r}.", fix=f"There are: {', '.join(there) or 'none'}.")
    if folder.exists():
        raise RunError(f"{folder} is there already.", fix="Remove it or choose another folder.")
    newest = max(finished, key=lambda path: path.stat().st_mtime)
    rows = _converted(stage, list(read_jsonl(newest / "rows.jsonl")))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    Dataset.from_list(rows).save_to_disk(str(partial))
    partial.rename(folder)
    return len(rows)


def _converted(stage: str, rows: list[Row]) -> list[Row]:
    if stage == "preferences":
        return preferences.training_rows(rows)
    if stage == "revisions":
        return [
            {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["response"]}]}
            for row in revisions.final_rows(rows)
        ]
    return rows
