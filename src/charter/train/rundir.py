"""The run directory: stages addressed by content, rows journalled as they are made, nothing torn taken for whole.

Layout of ``run/``::

    run.json                          format version and the digest of the charter that owns the directory
    stages/<name>/<key>/              one finished execution of a stage; <key> digests everything that it depends on
        manifest.json                 rows, digest of the rows, seconds, inputs
        rows.jsonl | model/           what the stage made
    stages/<name>/<key>.partial/      the same, unfinished: a journal of finished chunks, or training checkpoints

A stage folder appears under its final name by one atomic rename, after everything in it has been flushed to disk. A
journal line is one finished chunk with its checksum; a torn last line is cut off and that chunk is made again. Since a
chunk's rows depend on the chunk alone, an interrupted run finishes with the same rows as an undisturbed one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from charter.data import Row, read_jsonl
from charter.errors import DataError, RunError, StorageError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """One finished stage: its folder and what its manifest says."""

    name: str
    key: str
    path: Path
    manifest: Mapping[str, Any]
    cached: bool

    @property
    def digest(self) -> str:
        """Digest of what the stage made; the keys of later stages are built on it."""
        return str(self.manifest["digest"])

    def rows(self) -> list[Row]:
        """The rows that the stage made (none for a training stage)."""
        path = self.path / "rows.jsonl"
        return list(read_jsonl(path)) if path.exists() else []

    @property
    def model(self) -> Path:
        """The checkpoint that a training stage made."""
        return self.path / "model"


def stage_key(*parts: object) -> str:
    """Twelve hex digits over the canonical JSON of everything that a stage's result depends on."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:12]


def canonical(value: object) -> str:
    """JSON with sorted keys; dataclasses become objects and paths become strings."""

    def default(item: object) -> object:
        if dataclasses.is_dataclass(item) and not isinstance(item, type):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        raise TypeError(f"{type(item).__name__} cannot be part of a key.")

    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=default)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing.

    Raises:
        StorageError: the file system refused the write.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with _storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)


class RunDirectory:
    """A run directory held by this process; use as a context manager.

    Args:
        path: created where it does not exist.
        charter: digest of the charter; a directory of another charter is refused.

    Raises:
        RunError: another charter's directory, a directory with other content, or one that a live process holds.
    """

    def __init__(self, path: Path, *, charter: str) -> None:
        self.path = path
        self.finished_only = False
        """While true, a stage that is not finished is an error instead of work to do (``--from`` a later stage)."""
        self._lock: IO[str] | None = None
        self._charter = charter

    def __enter__(self) -> Self:
        with _storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._claim()
        self._lock = (self.path / ".lock").open("w", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise RunError(
                f"{self.path} is in use by another process.", fix="Wait for it to end or choose another --output."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim(self) -> None:
        marker = self.path / "run.json"
        if not marker.exists():
            others = [item.name for item in self.path.iterdir() if not item.name.startswith(".")]
            if others:
                raise RunError(
                    f"{self.path} holds other files ({min(others)}).", fix="Choose an empty or new --output."
                )
            write_atomically(marker, canonical({"format": FORMAT, "charter": self._charter}))
            return
        try:
            owner = json.loads(marker.read_text("utf-8"))
            digest = owner["charter"]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{marker} is not a run's marker file.", fix="Choose another --output.") from error
        if digest != self._charter:
            raise RunError(
                f"{self.path} belongs to charter {digest[:12]}, not to {self._charter[:12]}.",
                fix="Choose another --output for this charter.",
            )

    def rows_stage(
        self,
        name: str,
        key: str,
        chunks: Sequence[Sequence[Row]],
        work: Callable[[Sequence[Row]], list[Row]],
        *,
        extra: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Run ``work`` on every chunk that is not yet done and return the finished stage.

        Args:
            name: stage name.
            key: :func:`stage_key` over everything that the rows depend on.
            chunks: the input; its division into chunks must follow from the input alone.
            work: chunk in, rows out; a pure function of the chunk.
            extra: more entries for the manifest.
        """
        final = self._folder(name, key)
        found = self._finished(name, key, final)
        if found:
            return found
        partial = final.with_name(f"{key}.partial")
        with _storage(partial):
            partial.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            journal = partial / "journal.jsonl"
            done = recover_journal(journal)
            regenerated = 0
            with journal.open("ab") as stream:
                for index, chunk in enumerate(chunks):
                    if index in done:
                        continue
                    done[index] = work(chunk)
                    regenerated += 1
                    stream.write(journal_line(index, done[index]))
                    stream.flush()
                    os.fsync(stream.fileno())
            rows = [row for index in range(len(chunks)) for row in done[index]]
            text = "".join(canonical(row) + "\n" for row in rows)
            write_atomically(partial / "rows.jsonl", text)
            journal.unlink()
            manifest = {
                "name": name,
                "key": key,
                "digest": hashlib.sha256(text.encode()).hexdigest(),
                "rows": len(rows),
                "chunks": len(chunks),
                "chunks_made_last": regenerated,
                "seconds": round(time.perf_counter() - started, 3),
                **(extra or {}),
            }
            return self._finish(name, key, partial, final, manifest)

    def work_stage(self, name: str, key: str, work: Callable[[Path], Mapping[str, Any]]) -> Stage:
        """Run a stage that makes a folder (a training stage) and return it finished.

        ``work`` gets the partial folder, which may hold checkpoints of an interrupted try, and returns entries for
        the manifest, among them ``digest``.
        """
        final = self._folder(name, key)
        found = self._finished(name, key, final)
        if found:
            return found
        partial = final.with_name(f"{key}.partial")
        with _storage(partial):
            partial.mkdir(parents=True, exist_ok=True)
            started = time.perf_counter()
            entries = dict(work(partial))
            manifest = {"name": name, "key": key, "seconds": round(time.perf_counter() - started, 3), **entries}
            return self._finish(name, key, partial, final, manifest)

    def _folder(self, name: str, key: str) -> Path:
        return self.path / "stages" / name / key

    def _finished(self, name: str, key: str, final: Path) -> Stage | None:
        manifest = final / "manifest.json"
        if not manifest.exists():
            if self.finished_only:
                raise RunError(
                    f"Stage {name} is not finished in {self.path} with these settings.",
                    fix=f"Start with --from {name} or without --from.",
                )
            if final.exists():
                shutil.rmtree(final)
            return None
        return Stage(name, key, final, json.loads(manifest.read_text("utf-8")), cached=True)

    def _finish(self, name: str, key: str, partial: Path, final: Path, manifest: dict[str, Any]) -> Stage:
        write_atomically(partial / "manifest.json", canonical(manifest))
        partial.rename(final)
        _sync_folder(final.parent)
        return Stage(name, key, final, manifest, cached=False)


def journal_line(index: int, rows: Sequence[Row]) -> bytes:
    """One journal line: checksum, space, JSON of the chunk's number and rows."""
    body = canonical({"chunk": index, "rows": list(rows)}).encode()
    return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"


def recover_journal(path: Path) -> dict[int, list[Row]]:
    """The chunks of a journal; the file is cut after its last whole line."""
    done: dict[int, list[Row]] = {}
    if not path.exists():
        return done
    good = 0
    with path.open("rb") as stream:
        for line in stream:
            checksum, _, body = line.rstrip(b"\n").partition(b" ")
            whole = line.endswith(b"\n") and hashlib.sha256(body).hexdigest()[:16].encode() == checksum
            if not whole:
                break
            entry = json.loads(body)
            done[entry["chunk"]] = entry["rows"]
            good += len(line)
    if good != path.stat().st_size:
        os.truncate(path, good)
    return done


def chunked(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """Consecutive chunks of ``size`` rows."""
    if size < 1:
        raise DataError("A chunk needs at least one row.")
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}.",
            fix="Free some space or choose another --output; finished stages and chunks are kept.",
        ) from error


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
