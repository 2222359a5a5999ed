"""AI feedback: two answers a prompt, and the feedback model's probability that one keeps the charter better.

Labels are soft. Each pair is judged in both orders, since models favour a position, and by an ensemble of principles.

Source: Bai et al. 2022, Constitutional AI, section 4.1.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from charter.constitution import Charter, Principle
from charter.data import Conversation, Row
from charter.engine.base import Engine, Progress, Sampling, row_seed
from charter.train import filters

TEMPLATE_VERSION = "1"
"""Recorded with every label; raised when the wording around a charter's own questions changes."""

PREFILL = "The answer is: ("
"""How the feedback model's turn begins, so that its next token is the letter of an option."""

BINS = 10


@dataclass(frozen=True)
class PreferencesConfig:
    """How pairs are drawn and judged.

    Args:
        sampling: how both answers are drawn.
        principles: principles that judge a pair, drawn by weight without replacement.
        chain_of_thought: let the feedback model reason first; its probabilities are then clamped.
        thought: how the reasoning is drawn.
        clamp_low: lower end of the clamp.
        clamp_high: upper end of the clamp.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=72, temperature=1.0))
    principles: int = 2
    chain_of_thought: bool = False
    thought: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=96, temperature=0.7))
    clamp_low: float = 0.4
    clamp_high: float = 0.6

    def __post_init__(self) -> None:
        if self.principles < 1:
            raise ValueError("principles must be at least 1.")
        if not 0 <= self.clamp_low < self.clamp_high <= 1:
            raise ValueError("clamp_low must lie below clamp_high, both in [0, 1].")


def sample(
    prompts: Sequence[Row],
    engine: Engine,
    config: PreferencesConfig,
    *,
    charter: Charter,
    seed: int,
    progress: Progress | None = None,
) -> list[Row]:
    """Draw two answers to every prompt.

    Args:
        prompts: rows with ``id`` and ``prompt``.
        engine: the policy.
        config: sampling.
        charter: recorded with the rows.
        seed: of the run.
        progress: called as answers finish.

    Returns:
        Rows with ``id``, ``prompt`` (messages), ``response_a``, ``response_b``, ``flags_a``, ``flags_b``, ``tokens``,
        ``engine`` and ``charter``.
    """
    conversations = [Conversation.parse(row["prompt"]) for row in prompts]
    doubled = [item for item in conversations for _ in "ab"]
    seeds = [row_seed(seed, "sample", row["id"], letter) for row in prompts for letter in "ab"]
    answers = engine.generate(doubled, config.sampling, seeds=seeds, progress=progress)
    rows = []
    for index, row in enumerate(prompts):
        first, second = answers[2 * index : 2 * index + 2]
        asked = conversations[index].messages[-1].content
        rows.append(
            {
                "id": row["id"],
                "prompt": conversations[index].to_list(),
                "response_a": first.text,
                "response_b": second.text,
                "flags_a": filters.flag(asked, first.text, finish_reason=first.finish_reason),
                "flags_b": filters.flag(asked, second.text, finish_reason=second.finish_reason),
                "tokens": first.completion_tokens + second.completion_tokens,
                "engine": engine.digest,
                "charter": charter.digest,
            }
        )
    return rows


def label(
    pairs: Sequence[Row],
    engine: Engine,
    charter: Charter,
    config: PreferencesConfig,
    *,
    seed: int,
    progress: Progress | None = None,
) -> list[Row]:
    """Judge every pair in both orders under an ensemble of principles.

    Args:
        pairs: as :func:`sample` returns them.
        engine: the feedback model; it need not be the policy.
        charter: gives principles and questions.
        config: size of the ensemble, chain of thought.
        seed: of the run; which principles judge a pair depends on it and the pair's ``id``.
        progress: called with the pairs that are judged.

    Returns:
        The rows with ``probability`` (that answer A is better), ``by_principle`` (``principle``, ``question``,
        ``forward`` and ``reversed``: probability of A when listed first and second), ``position_bias`` (mean
        probability of the option listed first, less one half), ``chosen``, ``rejected``, ``label`` (probability that
        ``chosen`` is better, in [0.5, 1]), ``feedback`` (engine digest) and ``template``.
    """
    drawn = [draw(charter, config.principles, seed, row["id"]) for row in pairs]
    questions: list[Conversation] = []
    for row, ensemble in zip(pairs, drawn, strict=True):
        for first, second in ((row["response_a"], row["response_b"]), (row["response_b"], row["response_a"])):
            questions += [ask(Conversation.parse(row["prompt"]), first, second, question) for _, question in ensemble]
    firsts = iter(_first_option(questions, engine, config, seed))
    labelled = []
    for row, ensemble in zip(pairs, drawn, strict=True):
        listed_first = [[next(firsts) for _ in ensemble] for _ in range(2)]
        votes = [
            {"principle": principle.id, "question": question, "forward": forward, "reversed": 1 - second}
            for (principle, question), forward, second in zip(ensemble, *listed_first, strict=True)
        ]
        probability = _mean([(vote["forward"] + vote["reversed"]) / 2 for vote in votes])
        better, worse = ("a", "b") if probability >= 0.5 else ("b", "a")  # noqa: PLR2004
        labelled.append(
            {
                **row,
                "probability": probability,
                "by_principle": votes,
                "position_bias": _mean([*listed_first[0], *listed_first[1]]) - 0.5,
                "chosen": row[f"response_{better}"],
                "rejected": row[f"response_{worse}"],
                "label": max(probability, 1 - probability),
                "feedback": engine.digest,
                "template": TEMPLATE_VERSION,
            }
        )
    if progress:
        progress(len(labelled))
    return labelled


def calibrate(items: Sequence[Row], engine: Engine, charter: Charter, *, seed: int, bins: int = 5) -> dict[str, Any]:
    """How far the feedback model's probabilities can be trusted, on questions whose better answer is known.

    Args:
        items: rows with ``id``, ``prompt``, ``corrects``, ``incorrects`` and ``subset``; the first right and the first
            wrong answer are judged under the principle whose id is the subset, else under one drawn by weight.
        engine: the feedback model.
        charter: gives principles and questions.
        seed: of the draws and of which answer is listed first.
        bins: of equal width from 0.5 to 1.

    Returns:
        ``calibration`` (``predicted``: mean probability of the answer that the model prefers, ``observed``: share of
        them that is right, ``count``; empty bins are left out), ``accuracy`` and ``questions``.

    Source: reliability diagrams, Guo et al. 2017; for preference labels Bai et al. 2022, figure 9.
    """
    judged: list[tuple[float, bool]] = []
    questions: list[Conversation] = []
    known = {principle.id: principle for principle in charter.principles}
    for row in items:
        generator = random.Random(row_seed(seed, "calibrate", row["id"]))  # noqa: S311 - not for secrets
        principle = known.get(row["subset"]) or generator.choice(charter.principles)
        question = generator.choice(principle.preference_question)
        right, wrong, prompt = row["corrects"][0], row["incorrects"][0], Conversation.parse(row["prompt"])
        questions += [ask(prompt, right, wrong, question), ask(prompt, wrong, right, question)]
    firsts = [row[0] for row in engine.choose([item.add("assistant", PREFILL) for item in questions], ["A", "B"])]
    for forward, reversed_ in zip(firsts[::2], firsts[1::2], strict=True):
        probability = (forward + 1 - reversed_) / 2
        judged.append((max(probability, 1 - probability), probability > 0.5))  # noqa: PLR2004
    found = []
    for index in range(bins):
        low, high = 0.5 + 0.5 * index / bins, 0.5 + 0.5 * (index + 1) / bins
        inside = [item for item in judged if low <= item[0] < high or (index == bins - 1 and item[0] == 1)]
        if inside:
            observed = _mean([float(right) for _, right in inside])
            found.append({"predicted": _mean([p for p, _ in inside]), "observed": observed, "count": len(inside)})
    return {
        "calibration": found,
        "accuracy": _mean([float(right) for _, right in judged]),
        "questions": len(judged),
    }


def _first_option(
    questions: Sequence[Conversation], engine: Engine, config: PreferencesConfig, seed: int
) -> list[float]:
    """Probability of the option that is listed first, one a question."""
    if not config.chain_of_thought:
        asked = [question.add("assistant", PREFILL) for question in questions]
        return [row[0] for row in engine.choose(asked, ["A", "B"])]
    seeds = [row_seed(seed, "thought", index) for index in range(len(questions))]
    thoughts = engine.generate(
        [question.add("assistant", "Let's think step by step:") for question in questions],
        config.thought,
        seeds=seeds,
    )
    asked = [
        question.add("assistant", f"Let's think step by step: {thought.text}\n\n{PREFILL}")
        for question, thought in zip(questions, thoughts, strict=True)
    ]
    return [min(max(row[0], config.clamp_low), config.clamp_high) for row in engine.choose(asked, ["A", "B"])]


def ask(conversation: Conversation, first: str, second: str, question: str) -> Conversation:
    """The feedback model's task; the question stands last, so that the questions about a pair share their beginning."""
    names = {"system": "Instruction", "user": "Human", "assistant": "Assistant"}
    transcript = "\n\n".join(f"{names[item.role]}: {item.content}" for item in conversation.messages)
    return Conversation.user(
        f"Compare two answers to this conversation.\n\n{transcript}\n\nOptions:\n(A) {first}\n\n(B) {second}\n\n"
        f"{question} Reply with (A) or (B)."
    )


def draw(charter: Charter, size: int, seed: int, identifier: str) -> list[tuple[Principle, str]]:
    """The principles that judge a pair, by weight without replacement, each with one of its questions."""
    generator = random.Random(row_seed(seed, "judge", identifier))  # noqa: S311 - not for secrets
    pool = list(charter.principles)
    drawn: list[tuple[Principle, str]] = []
    while pool and len(drawn) < size:
        principle = generator.choices(pool, [item.weight for item in pool])[0]
        pool.remove(principle)
        drawn.append((principle, generator.choice(principle.preference_question)))
    return drawn


def training_rows(rows: Sequence[Row]) -> list[Row]:
    """Pairs as preference trainers want them; pairs with equal answers or a dropped answer are left out.

    Returns:
        Rows with ``prompt``, ``chosen`` and ``rejected`` (messages) and ``probability`` (that ``chosen`` is better).
    """
    return [
        {
            "prompt": row["prompt"],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "probability": row["label"],
        }
        for row in rows
        if usable(row)
    ]


def usable(row: Row) -> bool:
    """Whether a pair can train: answers that differ, neither of them dropped by a filter."""
    marks = {*row["flags_a"], *row["flags_b"]}
    return bool(row["response_a"] != row["response_b"] and not filters.DROPPED & marks)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """What the labels look like: counts, confidence, position bias, agreement of orders, and each principle's share.

    Returns:
        ``pairs``, ``kept``, ``histogram`` (of the probability that the option is better: ``low``, ``high``,
        ``count``), ``confidence`` (mean distance from one half), ``position_bias`` (``value``, ``low``, ``high``: mean
        and normal 95 % interval over pairs), ``order_agreement`` (share of judgements whose two orders name the same
        answer) and ``by_principle`` (``principle``, ``n``, ``confidence``, ``order_agreement``).
    """
    biases = [row["position_bias"] for row in rows]
    votes = [vote for row in rows for vote in row["by_principle"]]
    counts = [0] * BINS
    for row in rows:
        counts[min(int(row["probability"] * BINS), BINS - 1)] += 1
    mean = _mean(biases)
    spread = math.sqrt(sum((item - mean) ** 2 for item in biases) / (len(biases) - 1)) if len(biases) > 1 else 0.0
    margin = 1.96 * spread / math.sqrt(len(biases)) if biases else 0.0
    names = sorted({vote["principle"] for vote in votes})
    return {
        "pairs": len(rows),
        "kept": sum(usable(row) for row in rows),
        "histogram": [{"low": i / BINS, "high": (i + 1) / BINS, "count": count} for i, count in enumerate(counts)],
        "confidence": _mean([abs(row["probability"] - 0.5) for row in rows]),
        "position_bias": {"value": mean, "low": mean - margin, "high": mean + margin},
        **_agreement(votes),
        "by_principle": [
            {"principle": name, **_agreement([vote for vote in votes if vote["principle"] == name])} for name in names
        ],
    }


def _agreement(votes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    agree = [(vote["forward"] - 0.5) * (vote["reversed"] - 0.5) > 0 for vote in votes]
    return {
        "judgements": len(votes),
        "order_agreement": _mean([float(item) for item in agree]),
        "mean_margin": _mean([abs((vote["forward"] + vote["reversed"]) / 2 - 0.5) for vote in votes]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
