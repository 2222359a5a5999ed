"""The interface that every engine keeps: text in, text or probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from charter.data import Conversation

Progress = Callable[[int], None]
"""Called with the number of rows that have finished since the last call."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw text.

    Args:
        max_new_tokens: upper bound on generated tokens a row.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: nucleus mass kept (1.0 keeps all).
        top_k: number of tokens kept (0 keeps all).
        repetition_penalty: 1.0 is none (Keskar et al. 2019, CTRL).
        stop: strings that end a row; they are not part of the text.
    """

    max_new_tokens: int = 96
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError("max_new_tokens must be at least 1.")
        if self.temperature < 0:
            raise ValueError("temperature must not be negative.")
        if not 0 < self.top_p <= 1:
            raise ValueError("top_p must lie in (0, 1].")
        if self.top_k < 0:
            raise ValueError("top_k must not be negative.")
        if self.repetition_penalty <= 0:
            raise ValueError("repetition_penalty must be positive.")


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine wrote for one conversation.

    ``text`` holds no special tokens and no stop string, with surrounding white space removed (but see
    ``finish_reason``: ``length`` says that the text was cut at ``max_new_tokens``).
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@runtime_checkable
class Engine(Protocol):
    """Text in, text or probabilities out.

    Attributes:
        name: short human name, for example ``openvino int8``.
        digest: hex digest over weights, runtime and precision: two engines with one digest are interchangeable.
            It is recorded with every row that the engine writes.
    """

    name: str
    digest: str

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """Write the next assistant turn (or continue the last one) of each conversation.

        Args:
            conversations: one a row.
            sampling: the same for all rows.
            seeds: one a row; a row's text depends on its own seed and not on its neighbours, except where
                batched arithmetic rounds differently.
            progress: called as rows finish.

        Returns:
            One completion a conversation, in order.

        Raises:
            EngineError: a conversation that leaves no room in the context window, or a failed back end.
        """
        ...

    def choose(self, prompts: Sequence[Conversation], options: Sequence[str]) -> list[list[float]]:
        """The probability of each option as the continuation of each prompt, normalised over the options.

        One batched forward over the prompts; nothing is generated. An option of several tokens counts with the
        product of its tokens' probabilities.

        Returns:
            ``len(prompts)`` lists of ``len(options)`` probabilities that sum to one.
        """
        ...

    def reset(self) -> None:
        """Forget what earlier calls left in caches.

        Cached prefixes change a result in its last bits; a caller that wants the same rows again, whatever ran
        before, resets the engine where a unit of its work begins.
        """
        ...

    def close(self) -> None:
        """Free the weights or connections; the engine is not used again."""
        ...


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Log-probability of a given continuation: ``logprob`` in nats over ``tokens`` tokens."""

    logprob: float
    tokens: int

    @property
    def mean(self) -> float:
        """Nats a token."""
        return self.logprob / max(self.tokens, 1)


@runtime_checkable
class LikelihoodEngine(Engine, Protocol):
    """An engine that can also score given continuations (local engines can; most HTTP servers cannot)."""

    def loglikelihood(self, prompts: Sequence[Conversation], continuations: Sequence[str]) -> list[Likelihood]:
        """Log-probability of each continuation as the assistant's turn after its prompt, one pair a row."""
        ...


def row_seed(*parts: object) -> int:
    """A 31-bit seed from any parts (run seed, stage, row id, round): stable over processes and machines."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") & 0x7FFFFFFF


def combine_digests(*parts: str) -> str:
    """Hex SHA-256 over named parts, for engine and stage digests."""
    return hashlib.sha256("\x1f".join(parts).encode()).hexdigest()


MAX_ROWS = 64
"""Rows of one batch at most."""


def batches(sizes: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers, longest first, in batches whose padded size stays within the budget (one row at least).

    Args:
        sizes: tokens of each row.
        budget: rows x tokens of the longest row of a batch at most.
    """
    batch: list[int] = []
    for row in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        if batch and (sizes[batch[0]] * (len(batch) + 1) > budget or len(batch) == MAX_ROWS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
