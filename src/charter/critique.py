"""One step of critique and revision under a principle: used to make training rows and to mend a guarded answer.

The step is a conversation: the turns so far, the answer, a request for a critique, the critique, a request for a
revision. Exemplars of the charter stand before it as earlier turns, the same for every row, so that an engine that
keeps prefixes reads them once.

Source: Bai et al. 2022, Constitutional AI, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from charter.constitution import Charter, Principle
from charter.data import Conversation, Message
from charter.engine.base import Completion, Engine, Progress, Sampling, row_seed

TEMPLATE_VERSION = "1"
"""Recorded with every row; raised when the wording around a charter's own words changes."""


@dataclass(frozen=True)
class CritiqueConfig:
    """How a step is made.

    Args:
        critique: ask for a critique first; ``False`` asks for the revision at once.
        exemplars: how many of the charter's exemplars are shown.
        critique_sampling: how critiques are drawn.
        revision_sampling: how revisions are drawn.
    """

    critique: bool = True
    exemplars: int = 1
    critique_sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=48, temperature=0.7))
    revision_sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=72, temperature=0.7))


@dataclass(frozen=True, slots=True)
class Task:
    """An answer to be revised.

    Args:
        conversation: the turns before the answer.
        response: the answer.
        principle: what it is held to.
        wording: which of the principle's paired critique and revision requests is used.
        seed: of the critique and the revision.
    """

    conversation: Conversation
    response: str
    principle: Principle
    wording: int
    seed: int


@dataclass(frozen=True, slots=True)
class Revision:
    """What a step made; ``tokens`` counts what was generated for critique and revision together."""

    critique: str | None
    revision: str
    finish_reason: str
    tokens: int


def revise(
    engine: Engine,
    tasks: Sequence[Task],
    charter: Charter,
    config: CritiqueConfig,
    *,
    progress: Progress | None = None,
) -> list[Revision]:
    """Critique and revise a batch of answers.

    Args:
        engine: the model that writes both.
        tasks: one a row.
        charter: gives the exemplars.
        config: how the step is made.
        progress: called as revisions finish.

    Returns:
        One revision a task, in order.
    """
    shown = exemplar_turns(charter, config)
    asked = [Conversation((*shown, *task.conversation.messages, Message("assistant", task.response))) for task in tasks]
    critiques: list[Completion] | None = None
    if config.critique:
        asked = [
            item.add("user", task.principle.critique_request[task.wording])
            for item, task in zip(asked, tasks, strict=True)
        ]
        critiques = engine.generate(
            asked, config.critique_sampling, seeds=[row_seed(task.seed, "critique") for task in tasks]
        )
        asked = [
            # A chat template cannot hold an empty turn; the revision is asked for all the same.
            item.add("assistant", critique.text or "I have nothing to add.")
            for item, critique in zip(asked, critiques, strict=True)
        ]
    asked = [
        item.add("user", task.principle.revision_request[task.wording]) for item, task in zip(asked, tasks, strict=True)
    ]
    revisions = engine.generate(
        asked,
        config.revision_sampling,
        seeds=[row_seed(task.seed, "revision") for task in tasks],
        progress=progress,
    )
    return [
        Revision(
            critique=critiques[row].text if critiques else None,
            revision=revision.text,
            finish_reason=revision.finish_reason,
            tokens=revision.completion_tokens + (critiques[row].completion_tokens if critiques else 0),
        )
        for row, revision in enumerate(revisions)
    ]


def _add_requests(conversations: Sequence[Conversation], requests: Sequence[str]) -> list[Conversation]:
    return [item.add("user", request) for item, request in zip(conversations, requests, strict=True)]


def exemplar_turns(charter: Charter, config: CritiqueConfig) -> tuple[Message, ...]:
    """The first exemplars of the charter as turns, in the order of a step; without critiques where they are off."""
    turns: list[Message] = []
    for exemplar in charter.exemplars[: config.exemplars]:
        principle = charter.principle(exemplar.principle)
        turns += [Message("user", exemplar.prompt), Message("assistant", exemplar.response)]
        if config.critique:
            turns += [Message("user", principle.critique_request[0]), Message("assistant", exemplar.critique)]
        turns += [Message("user", principle.revision_request[0]), Message("assistant", exemplar.revision)]
    return tuple(turns)
