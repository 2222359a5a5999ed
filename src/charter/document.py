"""YAML documents that know their lines: read a file into a frozen dataclass, or say exactly where it fails.

``build(AlignConfig, document)`` follows the dataclass's type hints (``str``, ``int``, ``float``, ``bool``, ``Literal``,
``Path``, ``X | None``, ``tuple[X, ...]``, nested dataclasses), refuses unknown keys with the nearest known one, and
names file, line, key and fix in a :class:`~charter.errors.DocumentError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml

from charter.errors import DocumentError

T = TypeVar("T")

_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")  # a text to YAML 1.1 where point or sign is missing

LONGEST_QUOTE = 40
"""Characters of a wrong value that an error message repeats."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A parsed YAML mapping together with the node tree that holds its line numbers."""

    root: yaml.MappingNode
    path: Path | None = None


def parse(text: str, *, path: Path | None = None) -> Document:
    """Parse YAML text whose top level is a mapping.

    Raises:
        DocumentError: invalid YAML, duplicate keys, keys that are not texts, values that cannot be read or stored
            as UTF-8, or a top level that is not a mapping.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise DocumentError(
            f"not valid YAML: {problem}.",
            path=path,
            line=mark.line + 1 if mark else None,
            fix="Check indentation, quotes and colons near that line.",
        ) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DocumentError(
            "a character is not allowed in YAML.", path=path, line=line, fix="Remove the control character."
        ) from error
    except RecursionError as error:
        raise DocumentError("lists or mappings are nested too deeply.", path=path, fix="Flatten them.") from error
    if root is None:
        raise DocumentError("the document is empty.", path=path, line=1, fix="Run `charter init` for a complete one.")
    if not isinstance(root, yaml.MappingNode):
        raise DocumentError(
            "the top level must be a mapping of keys.", path=path, line=_line(root), fix="Write `key: value` lines."
        )
    for key, node in _nodes(root):
        _check(node, key, path)
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


def value(document: Document, key: str) -> Any:
    """The plain value at a top-level key, before :func:`build`; ``None`` where the key is not there."""
    child = _child(document.root, key)
    return None if child is None else _plain(child[0], key, document.path)


def _nodes(root: yaml.Node) -> Iterator[tuple[str, yaml.Node]]:
    """Every node with its dotted key, once each: aliases may make the tree a graph with cycles."""
    seen: set[int] = set()
    waiting: list[tuple[str, yaml.Node]] = [("", root)]
    while waiting:
        key, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield key, node
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{key}[{index}]", child) for index, child in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(_join(key, str(name.value)), child) for name, child in node.value]


def _check(node: yaml.Node, key: str, path: Path | None) -> None:
    if isinstance(node, yaml.ScalarNode):
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise _fail("the text holds half a surrogate pair.", node, key, path, "Write the character itself.")
    elif isinstance(node, yaml.MappingNode):
        names: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise _fail("a key must be a text.", name, key, path, "Write `key: value` lines.")
            if name.value in names:
                raise _fail("the key stands twice.", name, _join(key, name.value), path, "Remove one of them.")
            names.add(name.value)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


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
        full = _join(key, name)
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            fix = f"Did you mean `{near[0]}`?" if near else f"Known keys: {', '.join(fields)}."
            raise _fail("unknown key.", key_node, full, path, fix)
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
        return _convert_literal(arguments, node, key, path)
    if origin is tuple:
        return _convert_tuple(arguments, node, key, path)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(node, yaml.MappingNode):
            raise _fail("must be a mapping of keys.", node, key, path, "Write `key: value` lines below it.")
        return _plain(node, key, path)
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


def _convert_literal(arguments: tuple[Any, ...], node: yaml.Node, key: str, path: Path | None) -> Any:
    value = _scalar(node, key, path)
    for argument in arguments:
        # YAML reads a bare `off` or `no` as false; where those are words of the format, the word is meant.
        if argument == (node.value if isinstance(argument, str) else value) and value is not None:
            return argument
    near = difflib.get_close_matches(str(node.value), [str(item) for item in arguments], n=1, cutoff=0.5)
    hint = f"Did you mean `{near[0]}`? " if near else ""
    choices = ", ".join(map(str, arguments))
    raise _fail(f"{_quoted(node)} is not allowed.", node, key, path, f"{hint}Use one of {choices}.")


def _convert_tuple(arguments: tuple[Any, ...], node: yaml.Node, key: str, path: Path | None) -> tuple[Any, ...]:
    item = arguments[0]
    hints = None if arguments[-1] is Ellipsis else arguments
    if isinstance(node, yaml.SequenceNode):
        if hints is not None and len(hints) != len(node.value):
            raise _fail(f"must have {len(hints)} items, not {len(node.value)}.", node, key, path)
        pairs = zip(hints or [item] * len(node.value), node.value, strict=True)
        return tuple(_convert(hint, child, f"{key}[{index}]", path) for index, (hint, child) in enumerate(pairs))
    if isinstance(node, yaml.ScalarNode) and item is str and hints is None:
        return (_convert(item, node, key, path),)
    raise _fail("must be a list.", node, key, path, "Write one `- item` a line.")


def _convert_scalar(hint: Any, node: yaml.Node, key: str, path: Path | None) -> Any:
    value = _scalar(node, key, path)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is Any:
        return value
    if hint is float and (number or (isinstance(value, str) and _EXPONENT.fullmatch(value))):
        with contextlib.suppress(OverflowError):
            if math.isfinite(result := float(value)):
                return result
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is str and number:
        return str(node.value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}
    fixes = {str: "Write the text, in quotes.", int: "Write digits only.", float: "Write a number such as 0.5."}
    if value is None:
        raise _fail(f"has no value; it must be {names.get(hint, hint.__name__)}.", node, key, path, "Write one.")
    fix = fixes.get(hint, "")
    raise _fail(f"must be {names.get(hint, hint.__name__)}, not {_quoted(node)}.", node, key, path, fix)


def _scalar(node: yaml.Node, key: str, path: Path | None) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise _fail("must be a single value.", node, key, path, "Write it on the key's line.")
    return _plain(node, key, path)


def _quoted(node: yaml.Node) -> str:
    text = str(node.value)
    return repr(text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "...")


def _plain(node: yaml.Node, key: str, path: Path | None) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise _fail("the value cannot be read as its YAML type.", node, key, path, "Put it in quotes.") from error
    finally:
        loader.dispose()
