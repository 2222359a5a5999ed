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


@dataclass(frozen=True)
class TrainSettings:
    """What the training stages have in common.

    Args:
        learning_rate: peak, reached after the warm-up; it falls to zero along a cosine.
        epochs: passes over the rows.
        max_steps: ends training earlier; -1 is no bound.
        batch_size: rows (or pairs) of one forward and backward.
        gradient_accumulation: forwards of one update.
        max_length: tokens of a row at most; what is over is cut off at the end.
        warmup: share of the updates until the peak.
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


@dataclass(frozen=True)
class SFTSettings(TrainSettings):
    """Supervised fine-tuning; the loss counts the answer alone.

    Args:
        packing: put several rows into one sequence of ``max_length``; with attention that keeps them apart only
            where FlashAttention is installed.
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


@dataclass(frozen=True)
class RewardSettings(TrainSettings):
    """Reward modelling with soft labels."""

    batch_size: int = 4


@dataclass(frozen=True)
class GRPOSettings(TrainSettings):
    """Group-relative policy optimisation (Shao et al. 2024, DeepSeekMath).

    Args:
        generations: answers a prompt that are compared with one another.
        max_new_tokens: of an answer.
        temperature: of sampling.
        beta: weight of the KL divergence from the reference; 0 needs no reference.
    """

    learning_rate: float = 2e-5
    max_steps: int = 6
    batch_size: int = 16
    generations: int = 4
    max_new_tokens: int = 48
    temperature: float = 1.0
    beta: float = 0.0
