"""Every error that Charter raises on purpose.

Each carries one sentence that says what is wrong and, where it is known, one that says what to do about it.
The command line prints both and exits with :attr:`CharterError.exit_code`; a library user catches
:class:`CharterError` or one of its kinds. Anything else that escapes is a bug in Charter.
"""

from __future__ import annotations

from pathlib import Path


class CharterError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong, in one sentence.
        fix: what the reader can do about it, in one sentence.
    """

    exit_code: int = 1

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message} {self.fix}" if self.fix else self.message


class DocumentError(CharterError):
    """A YAML document (a charter or a configuration) that cannot be used.

    Args:
        message: what is wrong.
        path: the file, or ``None`` for text that came from elsewhere.
        line: 1-based line of the offending key or value.
        key: dotted path of the key, for example ``principles[2].weight``.
        fix: what to write instead.
    """

    exit_code = 2

    def __init__(
        self, message: str, *, path: Path | None = None, line: int | None = None, key: str = "", fix: str = ""
    ) -> None:
        super().__init__(message, fix=fix)
        self.path = path
        self.line = line
        self.key = key

    def __str__(self) -> str:
        place = str(self.path) if self.path else "<text>"
        if self.line is not None:
            place += f":{self.line}"
        head = f"{place}: {self.key}: " if self.key else f"{place}: "
        return head + super().__str__()


class DataError(CharterError):
    """Rows that cannot be read or lack what a stage needs (path, row and column are named in the message)."""

    exit_code = 3


class ModelError(CharterError):
    """A model that cannot be found, fetched, verified or loaded."""

    exit_code = 4


class EngineError(CharterError):
    """An engine that failed to generate or to score: a dead endpoint, a refused request, no memory at batch one."""

    exit_code = 5


class RunError(CharterError):
    """A run directory that cannot be used: another charter's, locked by a live process, not a run directory."""

    exit_code = 6


class StorageError(CharterError):
    """The file system refused a write (disk full, no permission); everything finished before is kept."""

    exit_code = 7


class MissingExtraError(CharterError):
    """A feature whose optional dependencies are not installed; the fix names the extra."""

    exit_code = 8
