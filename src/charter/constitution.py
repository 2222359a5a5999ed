"""The charter: principles to train for and harm categories to guard against, read from one YAML file.

``load("charter.yaml")`` parses, validates and digests it. The digest covers meaning, not layout: comments, key order
and white space do not change it; any word that a model would read does. Everything downstream records it.
"""

from __future__ import annotations

import dataclasses
import difflib
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

FORMAT = 1
"""Version of the file format that this release reads."""

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
    version = document.value(source, "charter")
    if isinstance(version, int) and version != FORMAT:  # first: another format's keys would be reported as unknown
        raise DocumentError(
            f"format {version} is not known.",
            path=source.path,
            line=document.locate(source, "charter"),
            key="charter",
            fix=f"Write `charter: {FORMAT}`.",
        )
    charter = document.build(Charter, source)
    _Validator(charter, source).run()
    return charter


@dataclass(frozen=True)
class _Validator:
    """Checks of meaning that types cannot state; the first failure is raised with its line."""

    charter: Charter
    source: Document

    def run(self) -> None:
        self._text("name", self.charter.name, "Give the charter a name.")
        for name, items in (("principles", self.charter.principles), ("categories", self.charter.categories)):
            if not items:
                raise self._error(name, "the list is empty.", "Add at least one entry.")
            self._identifiers(name, [item.id for item in items])
        for index, principle in enumerate(self.charter.principles):
            self._principle(principle, f"principles[{index}]")
        for index, category in enumerate(self.charter.categories):
            self._category(category, f"categories[{index}]")
        for index, exemplar in enumerate(self.charter.exemplars):
            key = f"exemplars[{index}]"
            self._known(exemplar.principle, self._principle_ids(), f"{key}.principle")
            for name in ("prompt", "response", "critique", "revision"):
                self._text(f"{key}.{name}", getattr(exemplar, name), "Write the text or remove the exemplar.")

    def _error(self, key: str, message: str, fix: str) -> DocumentError:
        line = document.locate(self.source, key)
        return DocumentError(message, path=self.source.path, line=line, key=key, fix=fix)

    def _text(self, key: str, text: str, fix: str) -> None:
        if not text.strip():
            raise self._error(key, "the text is empty.", fix)

    def _principle_ids(self) -> Sequence[str]:
        return [item.id for item in self.charter.principles]

    def _identifiers(self, name: str, identifiers: Sequence[str]) -> None:
        for index, identifier in enumerate(identifiers):
            key = f"{name}[{index}].id"
            if not _ID.fullmatch(identifier):
                raise self._error(key, f"{identifier!r} is not an identifier.", "Use a-z, 0-9 and _, a letter first.")
            if identifier in identifiers[:index]:
                raise self._error(key, f"the id {identifier!r} stands twice.", "Rename one of the two.")

    def _principle(self, item: Principle, key: str) -> None:
        self._text(f"{key}.text", item.text, "State the principle in one sentence.")
        if not 0 < item.weight < float("inf"):
            raise self._error(f"{key}.weight", f"{item.weight} is not a weight.", "Use a number above 0.")
        for name in ("critique_request", "revision_request", "preference_question"):
            wordings: tuple[str, ...] = getattr(item, name)
            if not wordings:
                raise self._error(f"{key}.{name}", "there is no wording.", "Write at least one.")
            for index, wording in enumerate(wordings):
                self._text(f"{key}.{name}[{index}]", wording, "Write the wording or remove the line.")
        if len(item.critique_request) != len(item.revision_request):
            raise self._error(
                f"{key}.revision_request",
                f"{len(item.revision_request)} revision requests for {len(item.critique_request)} critique requests.",
                "Write as many of one as of the other; they are drawn as pairs.",
            )

    def _category(self, item: HarmCategory, key: str) -> None:
        if not 0 < item.threshold < 1:
            raise self._error(f"{key}.threshold", f"{item.threshold} is out of range.", "Use a number between 0 and 1.")
        self._text(f"{key}.description", item.description, "Say what falls under the category.")
        if item.always_block and item.action == "allow":
            raise self._error(f"{key}.action", "an always blocked category cannot be allowed.", "Use `refuse`.")
        self._references(f"{key}.principles", item.principles, self._principle_ids())
        self._references(f"{key}.mlcommons", item.mlcommons, MLCOMMONS_HAZARDS)
        self._references(f"{key}.openai", item.openai, OPENAI_CATEGORIES)

    def _references(self, key: str, values: Sequence[str], known: Sequence[str]) -> None:
        for index, value in enumerate(values):
            self._known(value, known, f"{key}[{index}]")
            if value in values[:index]:
                raise self._error(f"{key}[{index}]", f"{value!r} stands twice.", "Remove one of the two.")

    def _known(self, value: str, known: Sequence[str], key: str) -> None:
        if value not in known:
            near = [item for item in known if item.lower() == value.lower()]
            near = near or difflib.get_close_matches(value, known, n=1)
            fix = f"Did you mean `{near[0]}`?" if near else f"Use one of {', '.join(known)}."
            raise self._error(key, f"{value!r} is not known.", fix)
