from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from charter.errors import RunError, StorageError
from charter.train.rundir import RunDirectory, chunked, journal_line, recover_journal, stage_key

CHARTER = "c" * 64
CHILD = """
import os, signal, sys
from pathlib import Path
from charter.train.rundir import RunDirectory, chunked
die_at, seen = int(sys.argv[2]), 0
def work(chunk):
    global seen
    if seen == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    seen += 1
    return [{"id": row["id"], "double": 2 * row["id"]} for row in chunk]
with RunDirectory(Path(sys.argv[1]), charter="c" * 64) as run:
    stage = run.rows_stage("numbers", "key", chunked([{"id": i} for i in range(10)], 3), work)
    print(stage.manifest["chunks_made_last"], stage.digest)
"""


def spawn(folder: Path, die_at: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(die_at)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("die_at", [0, 1, 3])
def test_killed_process_finishes_with_same_rows(tmp_path: Path, die_at: int) -> None:
    undisturbed = spawn(tmp_path / "whole", die_at=-1)
    assert undisturbed.returncode == 0, undisturbed.stderr
    killed = spawn(tmp_path / "killed", die_at=die_at)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "stages" / "numbers" / "key").exists()
    again = spawn(tmp_path / "killed", die_at=-1)
    made, digest = again.stdout.split()
    assert digest == undisturbed.stdout.split()[1]
    assert int(made) == 4 - die_at


def test_torn_journal_line_is_cut(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    whole = journal_line(0, [{"id": 1}])
    journal.write_bytes(whole + journal_line(1, [{"id": 2}])[:-5])
    assert recover_journal(journal) == {0: [{"id": 1}]}
    assert journal.read_bytes() == whole


def test_second_run_is_cached(tmp_path: Path) -> None:
    calls: list[int] = []

    def work(chunk: object) -> list[dict[str, object]]:
        calls.append(1)
        return [{"id": 1}]

    for expected in (False, True):
        with RunDirectory(tmp_path / "run", charter=CHARTER) as run:
            stage = run.rows_stage("s", stage_key("a", 1), chunked([{"id": 1}], 1), work)
            assert stage.cached is expected
            assert stage.rows() == [{"id": 1}]
    assert len(calls) == 1


def test_other_charter_is_refused(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", charter=CHARTER):
        pass
    with (
        pytest.raises(RunError, match="belongs to charter cccccccccccc"),
        RunDirectory(tmp_path / "run", charter="d" * 64),
    ):
        pass


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="notes.txt"), RunDirectory(tmp_path, charter=CHARTER):
        pass


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", charter=CHARTER):
        other = spawn(tmp_path / "run", die_at=-1)
    assert other.returncode != 0
    assert "in use by another process" in other.stderr


def test_full_disk_is_a_typed_error_and_keeps_chunks(tmp_path: Path) -> None:
    def work(chunk: list[dict[str, int]]) -> list[dict[str, int]]:
        if chunk[0]["id"] == 1:
            raise OSError(28, os.strerror(28))
        return chunk

    chunks = chunked([{"id": 0}, {"id": 1}], 1)
    with RunDirectory(tmp_path / "run", charter=CHARTER) as run:
        with pytest.raises(StorageError, match="No space left"):
            run.rows_stage("s", "k", chunks, work)
        stage = run.rows_stage("s", "k", chunks, list)
    assert stage.manifest["chunks_made_last"] == 1
