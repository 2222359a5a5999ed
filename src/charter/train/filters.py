"""Stated rules that mark degenerate answers; each mark is counted in the report.

The rules look for the ways in which a small model fails at critique and revision. They do not judge harm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

DROPPED: frozenset[str] = frozenset({"empty", "prompt_echo", "repetition", "unchanged", "boilerplate_refusal"})
"""Marks that keep an answer out of training; ``truncated`` is information only."""

ECHO_WORDS = 6
"""Words that a prompt needs before an answer that merely begins with it counts as an echo."""

REPETITION_WORDS = 12
"""Words that an answer needs before it can count as a loop."""

_WORD = re.compile(r"\w+")
_BOILERPLATE = re.compile(
    r"(i'?m sorry,? (but )?|i apologi[sz]e,? (but )?|sorry,? (but )?|as an ai( language model| assistant)?,? )?"
    r"i (can'?t|cannot|can not|am unable to|'?m unable to|am not able to|won'?t)"
    r"( (help|assist)( you)?| (do|provide|answer|fulfil+|comply with)) ?(with )?(that|this|it|your request)?"
    r"( request)?[.!]?",
    re.IGNORECASE,
)


def flag(prompt: str, response: str, *, previous: str | None = None, finish_reason: str | None = None) -> list[str]:
    """The marks of one answer, in a fixed order.

    Args:
        prompt: the text of the last user turn.
        response: the answer.
        previous: the answer that this one revises.
        finish_reason: as the engine reported it.

    Returns:
        Any of ``empty`` (no word), ``prompt_echo`` (:func:`echoes`), ``repetition`` (:func:`repeats`), ``unchanged``
        (the same words as ``previous``), ``boilerplate_refusal`` (nothing but one stock sentence of refusal, without
        reason or offer) and ``truncated`` (cut at the token limit).
    """
    words = _words(response)
    marks = {
        "empty": not words,
        "prompt_echo": bool(words) and echoes(prompt, response),
        "repetition": repeats(response),
        "unchanged": previous is not None and bool(words) and words == _words(previous),
        "boilerplate_refusal": bool(
            _BOILERPLATE.fullmatch(response.strip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
        ),
        "truncated": finish_reason == "length",
    }
    return [name for name, marked in marks.items() if marked]


def echoes(prompt: str, response: str) -> bool:
    """Whether the answer's words are the prompt's words, or begin with all of them where the prompt has six or more."""
    asked, answered = _words(prompt), _words(response)
    return bool(asked) and (answered == asked or (len(asked) >= ECHO_WORDS and answered[: len(asked)] == asked))


def repeats(response: str, *, size: int = 4, share: float = 0.5) -> bool:
    """Whether over ``share`` of the word ``size``-grams stand earlier in the answer already (12 words or more)."""
    words = _words(response)
    if len(words) < REPETITION_WORDS:
        return False
    grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(grams)) / len(grams) > share


def count(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many rows carry each mark, most frequent first."""
    return dict(Counter(mark for row in rows for mark in row.get("flags", ())).most_common())


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
