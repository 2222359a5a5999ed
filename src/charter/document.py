"""YAML documents that know their lines: read a file into a frozen dataclass, or say exactly where it fails.

``build(AlignConfig, document)`` follows the dataclass's type hints (``str``, ``int``, ``float``, ``bool``, ``Literal``,
``Path``, ``X | None``, ``tuple[X, ...]``, nested dataclasses), refuses unknown keys with the nearest known one, and
names file, line, key and fix in a :class:`~charter.errors.DocumentError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from charter.errors import DocumentError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Document:
    """A parsed YAML mapping together with the node tree that holds its line numbers."""

    root: yaml.MappingNode
    path: Path | None = None


def parse(text: str, *, path: Path | None = None) -> Document:
    """Parse YAML text whose top level is a mapping.

    Raises:
        DocumentError: invalid YAML, duplicate keys, or a top level that is not a mapping.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise DocumentError(
            f"not valid YAML: {error.problem or error.context}.",
            path=path,
            line=mark.line + 1 if mark else None,
            fix="Check indentation, quotes and colons near that line.",
        ) from error
    except yaml.YAMLError as error:
        raise DocumentError(f"not valid YAML: {error}.", path=path, fix="Remove control characters.") from error
    if root is None:
        raise DocumentError("the document is empty.", path=path, line=1, fix="Run `charter init` for a complete one.")
    if not isinstance(root, yaml.MappingNode):
        raise DocumentError(
            "the top level must be a mapping of keys.", path=path, line=_line(root), fix="Write `key: value` lines."
        )
    return Document(root, path)


def read(path: str | Path) -> Document:
    """Read and parse a file.

    Raises:
        DocumentError: missing or unreadable file, invalid UTF-8, or anything :func:`parse` refuses.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"not valid UTF-8 at byte {error.start}.", path=path, fix="Save the file as UTF-8."
        ) from error
    except FileNotFoundError as error:
        raise DocumentError("there is no such file.", path=path, fix="Run `charter init` to write one.") from error
    except OSError as error:
        raise DocumentError(f"cannot be read: {error.strerror}.", path=path) from error
    return parse(text, path=path)


def build(cls: type[T], document: Document) -> T:
    """Build a (nested) dataclass from a document; see the module's docstring for what is checked."""
    return typing.cast(T, _build_dataclass(cls, document.root, "", document.path))


def locate(document: Document, key: str) -> int | None:
    """The 1-based line of a dotted key such as ``principles[2].weight``, or of its nearest parent that is there."""
    node: yaml.Node = document.root
    line = _line(node)
    for part in key.replace("[", ".[").split("."):
        child = _child(node, part)
        if child is None:
            break
        node, line = child
    return line


def _child(node: yaml.Node, part: str) -> tuple[yaml.Node, int] | None:
    if part.startswith("[") and isinstance(node, yaml.SequenceNode):
        index = int(part[1:-1])
        return (node.value[index], _line(node.value[index])) if index < len(node.value) else None
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == part:
                return value_node, _line(key_node)
    return None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _fail(message: str, node: yaml.Node, key: str, path: Path | None, fix: str = "") -> DocumentError:
    return DocumentError(message, path=path, line=_line(node), key=key, fix=fix)


def _build_dataclass(cls: Any, node: yaml.Node, key: str, path: Path | None) -> Any:
    if not isinstance(node, yaml.MappingNode):
        raise _fail("must be a mapping of keys.", node, key, path, "Write `key: value` lines below it.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        full = f"{key}.{name}" if key else name
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            fix = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(fields)}."
            raise _fail("unknown key.", key_node, full, path, fix)
        if name in values:
            raise _fail("the key stands twice.", key_node, full, path, "Remove one of them.")
        values[name] = _convert(hints[name], value_node, full, path)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise _fail(f"the key `{name}` is missing.", node, key, path, f"Add `{name}:` here.")
    try:
        return cls(**values)
    except ValueError as error:
        raise _fail(str(error), node, key, path) from error


def _convert(hint: Any, node: yaml.Node, key: str, path: Path | None) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, node, key, path)
    if origin is Literal:
        value = _scalar(node, key, path)
        if value not in arguments:
            near = difflib.get_close_matches(str(value), [str(item) for item in arguments], n=1, cutoff=0.5)
            hint_text = f"Did you mean `{near[0]}`? " if near else ""
            raise _fail(
                f"{value!r} is not allowed.",
                node,
                key,
                path,
                f"{hint_text}Use one of {', '.join(map(str, arguments))}.",
            )
        return value
    if origin is tuple:
        return _convert_tuple(arguments[0], node, key, path)
    if origin in (dict, Mapping) or hint is dict:
        return _plain(node)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, node, key, path)
    return _convert_scalar(hint, node, key, path)


def _convert_union(arguments: tuple[Any, ...], node: yaml.Node, key: str, path: Path | None) -> Any:
    if type(None) in arguments and isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return None
    candidates = [argument for argument in arguments if argument is not type(None)]
    failure: DocumentError | None = None
    for candidate in candidates:
        try:
            return _convert(candidate, node, key, path)
        except DocumentError as error:
            failure = failure or error
    assert failure is not None
    raise failure


def _convert_tuple(item: Any, node: yaml.Node, key: str, path: Path | None) -> tuple[Any, ...]:
    if isinstance(node, yaml.SequenceNode):
        return tuple(_convert(item, child, f"{key}[{index}]", path) for index, child in enumerate(node.value))
    if isinstance(node, yaml.ScalarNode) and item is str:
        return (_convert(item, node, key, path),)
    raise _fail("must be a list.", node, key, path, "Write one `- item` a line.")


def _convert_scalar(hint: Any, node: yaml.Node, key: str, path: Path | None) -> Any:
    value = _scalar(node, key, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(node.value)
    if hint is Any:
        return value
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    raise _fail(f"must be {names.get(hint, hint.__name__)}, not {node.value!r}.", node, key, path)


def _scalar(node: yaml.Node, key: str, path: Path | None) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _fail("must be a single value.", node, key, path)
    return _plain(node)


def _plain(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()
