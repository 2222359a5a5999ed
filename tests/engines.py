"""Engines for faults and for exact expectations; everything else in the tests runs real models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from charter.data import Conversation
from charter.engine import Completion, Sampling
from charter.engine.base import Progress


class ScriptedEngine:
    """Answers with a function of conversation and seed, and remembers what it was asked."""

    name = "scripted"
    digest = "scripted"

    def __init__(
        self,
        write: Callable[[Conversation, int], str] = lambda _, seed: f"answer {seed}",
        prefer: Callable[[Conversation], Sequence[float]] = lambda _: (0.5, 0.5),
    ) -> None:
        self._write, self._prefer = write, prefer
        self.asked: list[Conversation] = []
        self.chosen: list[Conversation] = []

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        del sampling
        self.asked += conversations
        if progress:
            progress(len(conversations))
        texts = [self._write(item, seed) for item, seed in zip(conversations, seeds, strict=True)]
        return [Completion(text, "stop", 1, len(text.split())) for text in texts]

    def choose(self, prompts: Sequence[Conversation], options: Sequence[str]) -> list[list[float]]:
        assert options == ["A", "B"]
        self.chosen += prompts
        return [list(self._prefer(prompt)) for prompt in prompts]

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass
