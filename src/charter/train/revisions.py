"""Respond, critique, revise: rows of red-team prompts become rows of answers, every intermediate kept.

Source: Bai et al. 2022, Constitutional AI, section 3.1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from charter.constitution import Charter, Principle
from charter.critique import TEMPLATE_VERSION, CritiqueConfig, Task, revise
from charter.data import Conversation, Row
from charter.engine.base import Engine, Progress, Sampling, row_seed
from charter.train import filters


@dataclass(frozen=True)
class RevisionsConfig:
    """How revisions are made.

    Args:
        rounds: critiques and revisions after the first answer.
        respond: how the first answer is drawn.
        critique: how each step is made.
    """

    rounds: int = 4
    respond: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=72, temperature=0.8))
    critique: CritiqueConfig = field(default_factory=CritiqueConfig)

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError("rounds must be at least 1.")


def run(
    prompts: Sequence[Row],
    engine: Engine,
    charter: Charter,
    config: RevisionsConfig,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[Row]:
    """Answer every prompt and revise the answer ``config.rounds`` times.

    Args:
        prompts: rows with ``id`` and ``prompt`` (a string or messages).
        engine: the policy.
        charter: gives principles and exemplars.
        config: rounds and sampling.
        seed: of the run; a prompt's draws depend on it, the prompt's ``id`` and the round.
        progress: called as answers and revisions finish.

    Returns:
        ``config.rounds + 1`` rows a prompt, ordered by prompt and then round, with ``id``, ``round`` (0 is the first
        answer), ``prompt`` (messages), ``principle``, ``wording``, ``critique``, ``response``, ``flags``
        (:func:`charter.train.filters.flag`), ``tokens``, ``seed``, ``template``, ``engine`` and ``charter``.
    """
    conversations = [Conversation.parse(row["prompt"]) for row in prompts]
    provenance = {"template": TEMPLATE_VERSION, "engine": engine.digest, "charter": charter.digest}

    def record(index: int, number: int, response: str, reason: str, **columns: Any) -> Row:
        earlier = rows[index][-1]["response"] if rows[index] else None
        return {
            "id": prompts[index]["id"],
            "round": number,
            "prompt": conversations[index].to_list(),
            **columns,
            "response": response,
            "flags": filters.flag(_last_user(conversations[index]), response, previous=earlier, finish_reason=reason),
            **provenance,
        }

    rows: list[list[Row]] = [[] for _ in prompts]
    seeds = [row_seed(seed, "respond", row["id"]) for row in prompts]
    answers = engine.generate(conversations, config.respond, seeds=seeds, progress=progress)
    for index, answer in enumerate(answers):
        rows[index].append(
            record(
                index,
                0,
                answer.text,
                answer.finish_reason,
                principle=None,
                wording=None,
                critique=None,
                tokens=answer.completion_tokens,
                seed=seeds[index],
            )
        )
    for number in range(1, config.rounds + 1):
        tasks = []
        for index, row in enumerate(prompts):
            principle, wording = draw(charter, seed, row["id"], number)
            tasks.append(
                Task(
                    conversations[index],
                    rows[index][-1]["response"] or "I have no answer.",
                    principle,
                    wording,
                    row_seed(seed, "revise", row["id"], number),
                )
            )
        for index, revision in enumerate(revise(engine, tasks, charter, config.critique, progress=progress)):
            rows[index].append(
                record(
                    index,
                    number,
                    revision.revision,
                    revision.finish_reason,
                    principle=tasks[index].principle.id,
                    wording=tasks[index].wording,
                    critique=revision.critique,
                    tokens=revision.tokens,
                    seed=tasks[index].seed,
                )
            )
    return [row for group in rows for row in group]


def draw(charter: Charter, seed: int, identifier: str, number: int) -> tuple[Principle, int]:
    """The principle (by weight) and the wording of one prompt's round; the same for the same arguments."""
    generator = random.Random(row_seed(seed, "principle", identifier, number))  # noqa: S311 - not for secrets
    principle = generator.choices(charter.principles, [item.weight for item in charter.principles])[0]
    return principle, generator.randrange(len(principle.critique_request))


def final_rows(rows: Sequence[Row]) -> list[Row]:
    """The last revision of each prompt that carries no mark of :data:`charter.train.filters.DROPPED`.

    Returns:
        Rows with ``id``, ``prompt`` (messages) and ``response``; a prompt without such a revision is left out.
    """
    last: dict[str, Row] = {}
    for row in rows:
        if row["round"] > 0 and not filters.DROPPED.intersection(row["flags"]):
            last[row["id"]] = {"id": row["id"], "prompt": row["prompt"], "response": row["response"]}
    return list(last.values())


def _last_user(conversation: Conversation) -> str:
    return next(item.content for item in reversed(conversation.messages) if item.role == "user")
