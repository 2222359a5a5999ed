"""Settings of the training stages; every default suits two CPU cores and the default model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021).

    Args:
        rank: of the two factors.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: on the adapters' input.
        target_modules: layers that get adapters; ``all-linear`` is every linear layer but the head.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str = "all-linear"

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank must be at least 1.")
        _require(self.alpha > 0, "alpha must be positive.")
        _require(0 <= self.dropout < 1, "dropout must lie in [0, 1).")


@dataclass(frozen=True)
class TrainSettings:
    """What the training stages have in common.

    Args:
        learning_rate: peak, reached after the warm-up; it falls to zero along a cosine.
        epochs: passes over the rows.
        max_steps: ends training earlier; -1 is no bound.
        batch_size: rows (or pairs) of one forward and backward.
        gradient_accumulation: forwards of one update.
        max_length: tokens of a row at most; an answer that goes over is cut off, and a row whose prompt alone fills
            it is left out.
        warmup: share of the updates until the peak, in [0, 1).
        max_grad_norm: gradients are clipped to it.
        full: train all weights in place of adapters.
        lora: the adapters.
        precision: ``auto`` is bf16 where the device has it.
        gradient_checkpointing: less memory for more time.
        save_steps: updates between checkpoints.
    """

    learning_rate: float = 1e-4
    epochs: float = 1.0
    max_steps: int = -1
    batch_size: int = 8
    gradient_accumulation: int = 1
    max_length: int = 512
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    full: bool = False
    lora: LoraSettings = field(default_factory=LoraSettings)
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    save_steps: int = 10

    def __post_init__(self) -> None:
        _require(self.learning_rate >= 0, "learning_rate must not be negative.")
        _require(self.epochs > 0, "epochs must be positive.")
        _require(self.max_steps == -1 or self.max_steps >= 1, "max_steps must be at least 1, or -1 for no bound.")
        _require(self.batch_size >= 1, "batch_size must be at least 1.")
        _require(self.gradient_accumulation >= 1, "gradient_accumulation must be at least 1.")
        _require(self.max_length >= 1, "max_length must be at least 1.")
        _require(0 <= self.warmup < 1, "warmup must lie in [0, 1).")
        _require(self.max_grad_norm > 0, "max_grad_norm must be positive.")
        _require(self.save_steps >= 1, "save_steps must be at least 1.")


@dataclass(frozen=True)
class SFTSettings(TrainSettings):
    """Supervised fine-tuning; the loss counts the answer alone.

    Args:
        packing: put several rows into one sequence of at most ``max_length``. Attention keeps them apart, so the loss
            is that of the rows one by one.
    """

    learning_rate: float = 2e-4
    packing: bool = False


@dataclass(frozen=True)
class DPOSettings(TrainSettings):
    """Preference optimisation with soft labels.

    Args:
        beta: strength of the pull towards the reference.
    """

    learning_rate: float = 5e-5
    batch_size: int = 4
    beta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.beta > 0, "beta must be positive.")


@dataclass(frozen=True)
class RewardSettings(TrainSettings):
    """Reward modelling with soft labels."""

    batch_size: int = 4


@dataclass(frozen=True)
class GRPOSettings(TrainSettings):
    """Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath).

    Args:
        generations: answers a prompt that are compared with one another; ``batch_size * gradient_accumulation`` must
            be a multiple of it.
        max_new_tokens: of an answer.
        temperature: of sampling.
        beta: weight of the KL divergence from the reference; 0 needs no reference.

    ``batch_size`` counts answers. A prompt that leaves fewer than ``max_new_tokens`` of ``max_length`` is left out.
    """

    learning_rate: float = 2e-5
    max_steps: int = 6
    warmup: float = 0.0  # one update in six would be without effect
    batch_size: int = 16
    generations: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.generations >= 2, "generations must be at least 2.")  # noqa: PLR2004 - a group to compare within
        _require(self.max_new_tokens >= 1, "max_new_tokens must be at least 1.")
        _require(self.temperature > 0, "temperature must be positive.")
        _require(self.beta >= 0, "beta must not be negative.")
        _require(
            self.batch_size * self.gradient_accumulation % self.generations == 0,
            "batch_size * gradient_accumulation must be a multiple of generations.",
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
