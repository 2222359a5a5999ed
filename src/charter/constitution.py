"""The charter: principles to train for and harm categories to guard against, read from one YAML file.

``load("charter.yaml")`` parses, validates and digests it. The digest covers meaning, not layout: comments, key order
and white space do not change it; any word that a model would read does. Everything downstream records it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from charter import document
from charter.document import Document
from charter.errors import DocumentError

Action = Literal["allow", "redact", "replace", "revise", "refuse"]

MLCOMMONS_HAZARDS: tuple[str, ...] = tuple(f"S{number}" for number in range(1, 15))
"""Hazard codes S1-S14 as used by Llama Guard 3 and MLCommons AILuminate (violent crimes ... code interpreter abuse)."""

OPENAI_CATEGORIES: tuple[str, ...] = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
"""The 13 category names of OpenAI's moderation endpoint."""

_ID = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Principle:
    """One rule that a model is trained towards.

    Args:
        id: lower-case identifier, unique in the charter.
        text: the rule in one sentence.
        weight: relative chance to be drawn for a critique and relative weight in an ensemble of preferences; > 0.
        critique_request: wordings that ask for a critique under this principle.
        revision_request: wordings that ask for the revision; as many as ``critique_request``, drawn as pairs.
        preference_question: wordings that ask which of two answers keeps the principle better.
    """

    id: str
    text: str
    critique_request: tuple[str, ...]
    revision_request: tuple[str, ...]
    preference_question: tuple[str, ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class HarmCategory:
    """One kind of harm that text is checked for.

    Args:
        id: lower-case identifier, unique in the charter.
        description: what falls under it, and what does not, in a sentence or two.
        threshold: probability from which the category counts as present, in (0, 1).
        action: what is done with text at or over the threshold.
        always_block: never allowed whatever the context; such a threshold never loosens.
        principles: ids of the principles that it breaks.
        mlcommons: MLCommons hazard codes that it covers.
        openai: OpenAI moderation category names that it maps to.
    """

    id: str
    description: str
    threshold: float
    action: Action = "refuse"
    always_block: bool = False
    principles: tuple[str, ...] = ()
    mlcommons: tuple[str, ...] = ()
    openai: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A worked critique and revision, shown to the model before its own (few-shot)."""

    principle: str
    prompt: str
    response: str
    critique: str
    revision: str


@dataclass(frozen=True)
class Charter:
    """Principles, harm categories and exemplars, with a digest of their content.

    Args:
        charter: version of the file format; 1.
        name: what people call it.
    """

    charter: int
    name: str
    principles: tuple[Principle, ...]
    categories: tuple[HarmCategory, ...]
    description: str = ""
    exemplars: tuple[Exemplar, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 over the canonical JSON of the content."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()

    def principle(self, identifier: str) -> Principle:
        """The principle of that id; :class:`KeyError` where there is none."""
        return {item.id: item for item in self.principles}[identifier]

    def category(self, identifier: str) -> HarmCategory:
        """The category of that id; :class:`KeyError` where there is none."""
        return {item.id: item for item in self.categories}[identifier]


def default_text() -> str:
    """The YAML text of the charter that ships with the package (``charter init`` writes it)."""
    return importlib.resources.files("charter.resources").joinpath("charter.yaml").read_text("utf-8")


def default() -> Charter:
    """The charter that ships with the package."""
    return parse(default_text())


def load(path: str | Path) -> Charter:
    """Read and validate a charter file.

    Raises:
        DocumentError: naming file, line, key and fix.
    """
    return _validated(document.read(path))


def parse(text: str, *, path: Path | None = None) -> Charter:
    """Read and validate charter text; raises as :func:`load` does."""
    return _validated(document.parse(text, path=path))


def _validated(source: Document) -> Charter:
    charter = document.build(Charter, source)
    _Validator(charter, source).run()
    return charter
