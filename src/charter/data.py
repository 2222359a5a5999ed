"""Conversations, and readers that turn files and data sets into rows.

A *row* is a plain ``dict`` with the field's standard column names (``prompt``, ``response``, ``messages``, ``chosen``,
``rejected``). ``prompt`` may be a string or a list of ``{"role", "content"}`` messages; both are accepted wherever a
prompt is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from charter.errors import DataError, MissingExtraError

Role = Literal["system", "user", "assistant"]
Row = dict[str, Any]

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: who speaks (``system``, ``user`` or ``assistant``) and what is said."""

    role: Role
    content: str

    def to_dict(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A sequence of turns, oldest first.

    Where the last turn is the assistant's, an engine *continues* it (a prefill); otherwise it writes the next
    assistant turn.
    """

    messages: tuple[Message, ...]

    @classmethod
    def user(cls, text: str) -> Conversation:
        """A conversation of one user turn."""
        return cls((Message("user", text),))

    @classmethod
    def parse(cls, value: object, *, where: str = "prompt") -> Conversation:
        """Read a string (one user turn) or a list of message mappings.

        Raises:
            DataError: naming ``where``, for an empty prompt, an unknown role or a wrong type.
        """
        if isinstance(value, Conversation):
            return value
        if isinstance(value, str):
            if not value.strip():
                raise DataError(f"{where} is empty.", fix="Remove the row or give it a text.")
            return cls.user(value)
        if not isinstance(value, Sequence) or not value:
            raise DataError(
                f"{where} must be a string or a non-empty list of messages, not {type(value).__name__}.",
                fix='Write "text" or [{"role": "user", "content": "text"}].',
            )
        messages = tuple(_parse_message(item, f"{where}[{index}]") for index, item in enumerate(value))
        if not any(message.role == "user" and message.content.strip() for message in messages):
            raise DataError(f"{where} has no user turn with text.", fix="Remove the row or give it a text.")
        return cls(messages)

    def add(self, role: Role, content: str) -> Conversation:
        """A new conversation with one more turn at the end."""
        return Conversation((*self.messages, Message(role, content)))

    def to_list(self) -> list[dict[str, str]]:
        """The ``messages`` column as data sets and chat templates want it."""
        return [message.to_dict() for message in self.messages]


def _parse_message(item: object, where: str) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        raise DataError(
            f"{where} must be a mapping with role and content, not {type(item).__name__}.",
            fix='Write {"role": "user", "content": "text"}.',
        )
    role, content = item.get("role"), item.get("content")
    if role not in ROLES:
        raise DataError(f"{where}.role is {str(role)[:20]!r}.", fix=f"Use one of {', '.join(ROLES)}.")
    if not isinstance(content, str):
        raise DataError(f"{where}.content must be a string, not {type(content).__name__}.", fix="Give the turn a text.")
    return Message(role, content)


def read_rows(source: str | Path, *, columns: Iterable[str] = (), split: str = "train") -> Iterator[Row]:
    """Read rows from a ``.jsonl``/``.parquet`` file, a folder saved by ``datasets``, or a Hugging Face data set id.

    Args:
        source: path or data set id. A path that exists wins; a value that looks like a file but does not exist is
            an error rather than a hub look-up.
        columns: columns that every row must have; their absence is an error that lists what is there.
        split: split to read where the source has several.

    Yields:
        One ``dict`` a row, in file order.

    Raises:
        DataError: unreadable file, invalid UTF-8 or JSON (line named), missing column, no rows.
    """
    required = tuple(columns)
    count = 0
    for count, row in enumerate(_iterate(str(source), split), start=1):
        missing = [name for name in required if row.get(name) is None]
        if missing:
            present = sorted(name for name, value in row.items() if value is not None)
            raise DataError(
                f"{source}, row {count}: column {missing[0]!r} is missing or null; "
                f"the row has {', '.join(present) or 'none'}.",
                fix=f"Name the columns {', '.join(required)}.",
            )
        yield row
    if count == 0:
        raise DataError(f"{source} has no rows.", fix="Give a file with at least one row.")


def _iterate(source: str, split: str) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix == ".parquet":
            return _read_parquet(path)
        if path.suffix in {".jsonl", ".json", ".ndjson"}:
            return read_jsonl(path)
        raise DataError(f"{source} is neither JSON Lines nor Parquet.", fix="Use a .jsonl or .parquet file.")
    if path.is_dir():
        return _read_saved_dataset(path, split)
    if path.suffix or source.startswith((".", "/", "~")):
        raise DataError(f"There is no file {source}.", fix="Check the path.")
    return _read_hub_dataset(source, split)


def read_jsonl(path: Path) -> Iterator[Row]:
    """Read one JSON object a line; blank lines are skipped.

    Raises:
        DataError: naming path and line, for invalid UTF-8, invalid JSON, or a line that is not an object.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}.", fix="Check the path and its permissions."
        ) from error
    with stream:
        for number, raw in enumerate(stream, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid UTF-8 at byte {error.start}.", fix="Save the file as UTF-8."
                ) from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}).",
                    fix="Write one JSON object a line.",
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: a number is too long or lists are nested too deeply.",
                    fix="Write one flat JSON object a line.",
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: a {type(row).__name__}, not an object.",
                    fix="Write one JSON object a line.",
                )
            if _SURROGATE.search(raw) and not _is_unicode(row):
                raise DataError(
                    f"{path}, line {number}: a \\u escape is half a surrogate pair.", fix="Write the character itself."
                )
            yield row


def _is_unicode(row: Row) -> bool:
    """Whether every string of the row can be encoded, that is, holds no lone surrogate."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file.", fix="Write it again; it may be truncated."
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "Reading a data set needs the datasets library.", fix="pip install 'charter[train]'"
        ) from error
    return datasets


def _read_saved_dataset(path: Path, split: str) -> Iterator[Row]:
    try:
        loaded = _datasets().load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is a folder that datasets cannot load.", fix="Use a folder written by save_to_disk."
        ) from error
    yield from _pick_split(loaded, split, str(path))


def _read_hub_dataset(name: str, split: str) -> Iterator[Row]:
    try:
        loaded = _datasets().load_dataset(name)
    except Exception as error:
        raise DataError(
            f"There is neither a file {name} nor a data set of that id that can be loaded ({type(error).__name__}).",
            fix="Check the path or the id and the network.",
        ) from error
    yield from _pick_split(loaded, split, name)


def _pick_split(loaded: Any, split: str, name: str) -> Iterator[Row]:
    if hasattr(loaded, "keys"):
        if split not in loaded:
            raise DataError(
                f"{name} has no split {split!r}; it has {', '.join(loaded)}.", fix="Name one of those splits."
            )
        loaded = loaded[split]
    for row in loaded:
        yield dict(row)
