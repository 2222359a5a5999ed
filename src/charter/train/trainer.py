"""The training stages: rows in, a checkpoint out. TRL does the training; this module says what is trained on.

Rows are encoded by :mod:`charter.engine.templates`, the same that generation uses, and handed to TRL as token ids.
Adapters are merged into full-precision weights at the end, so a stage's result is a plain checkpoint folder.

A killed stage continues from its last checkpoint that carries a marker; the marker is written and flushed after the
checkpoint is whole, and a checkpoint without one is deleted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference as DPOCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from charter.data import Conversation, Row
from charter.engine import templates
from charter.engine.base import Progress
from charter.errors import DataError
from charter.train.losses import neutral_rewards, soft_dpo_loss, soft_preference_loss
from charter.train.settings import DPOSettings, GRPOSettings, LoraSettings, RewardSettings, SFTSettings
from charter.train.stage import PROBABILITY, Stage, TrainResult, quiet

__all__ = [
    "DPOSettings",
    "GRPOSettings",
    "LoraSettings",
    "Reward",
    "RewardSettings",
    "SFTSettings",
    "SoftDPOTrainer",
    "SoftRewardTrainer",
    "TrainResult",
    "train_dpo",
    "train_grpo",
    "train_reward",
    "train_sft",
]

Reward = Callable[[list[Conversation], list[str]], list[float | None]]
"""Conversations and answers in, one reward an answer out; ``None`` is unscored."""


@quiet()
def train_sft(
    rows: Sequence[Row],
    model: Path,
    output: Path,
    settings: SFTSettings,
    *,
    seed: int,
    report_to: str = "none",
    progress: Progress | None = None,
) -> TrainResult:
    """Supervised fine-tuning on answers.

    Args:
        rows: with ``prompt`` (a string or messages) and ``response``.
        model: folder to start from.
        output: working folder; the result is ``output/model``.
        settings: see :class:`SFTSettings`.
        seed: of the order of rows and of new weights.
        report_to: ``none``, ``tensorboard`` or ``wandb``.
        progress: called with 1 after each update.

    Raises:
        DataError: no rows, or an answer without text.
        ModelError: a model that cannot be loaded.
    """
    stage = Stage(model, output, settings, seed, report_to, progress)
    data = stage.answers(rows)
    arguments = stage.arguments(
        trl.SFTConfig, max_length=settings.max_length, packing=settings.packing, completion_only_loss=True
    )
    trainer = trl.SFTTrainer(
        model=stage.load(),
        args=arguments,
        train_dataset=data,
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("CAUSAL_LM"),
    )
    return stage.run(trainer, data)


@quiet()
def train_dpo(
    rows: Sequence[Row],
    model: Path,
    output: Path,
    settings: DPOSettings,
    *,
    seed: int,
    report_to: str = "none",
    progress: Progress | None = None,
) -> TrainResult:
    """Direct preference optimisation with a soft label a pair; arguments and errors as :func:`train_sft`.

    ``rows`` hold ``prompt``, ``chosen``, ``rejected`` (strings or messages) and ``probability`` that the chosen answer
    is better (1 where the column is absent). The reference is the start model.
    """
    stage = Stage(model, output, settings, seed, report_to, progress)
    data = stage.pairs(rows)
    trainer = SoftDPOTrainer(
        model=stage.load(),
        args=stage.arguments(trl.DPOConfig, max_length=settings.max_length, beta=settings.beta),
        train_dataset=data,
        data_collator=_SoftDPOCollator(pad_token_id=stage.tokenizer.pad_token_id, max_length=settings.max_length),
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("CAUSAL_LM"),
    )
    return stage.run(trainer, data)


@quiet()
def train_reward(
    rows: Sequence[Row],
    model: Path,
    output: Path,
    settings: RewardSettings,
    *,
    seed: int,
    report_to: str = "none",
    progress: Progress | None = None,
) -> TrainResult:
    """A reward model from soft labels; arguments and errors as :func:`train_dpo`.

    The result is a sequence-classification model with one label whose value is the reward.
    """
    stage = Stage(model, output, settings, seed, report_to, progress)
    data = stage.pairs(rows, whole=True)
    trainer = SoftRewardTrainer(
        model=stage.load(classifier=True),
        args=stage.arguments(trl.RewardConfig, max_length=settings.max_length),
        train_dataset=data,
        data_collator=_SoftRewardCollator(pad_token_id=stage.tokenizer.pad_token_id),
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("SEQ_CLS"),
    )
    return stage.run(trainer, data, classifier=True)


@quiet()
def train_grpo(
    rows: Sequence[Row],
    model: Path,
    output: Path,
    settings: GRPOSettings,
    *,
    rewards: Sequence[Reward],
    seed: int,
    report_to: str = "none",
    progress: Progress | None = None,
) -> TrainResult:
    """Reinforcement learning on rewards; arguments and errors as :func:`train_sft`.

    Args:
        rows: with ``prompt``.
        model: folder to start from.
        output: working folder; the result is ``output/model``.
        settings: see :class:`GRPOSettings`.
        rewards: their sum is maximised within each prompt's group of answers. An answer that no reward scored moves
            nothing; one that some scored counts, for the others, as the mean of its group.
        seed: of the order of rows, of new weights and of sampling.
        report_to: ``none``, ``tensorboard`` or ``wandb``.
        progress: called with 1 after each update.
    """
    stage = Stage(model, output, settings, seed, report_to, progress)
    data = stage.prompts(rows, room=settings.max_new_tokens)
    trainer = RewardedGRPOTrainer(
        model=stage.load(),
        reward_funcs=[_named(reward, index) for index, reward in enumerate(rewards)],
        args=stage.arguments(
            trl.GRPOConfig,
            num_generations=settings.generations,
            max_completion_length=settings.max_new_tokens,
            temperature=settings.temperature,
            beta=settings.beta,
        ),
        train_dataset=data,
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("CAUSAL_LM"),
    )
    return stage.run(trainer, data)


# --- trainers ---------------------------------------------------------------------------------------------------------


class SoftDPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """``DPOTrainer`` over encoded pairs with the column ``probability`` (Rafailov et al. 2023; see ``losses``)."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PROBABILITY not in self._signature_columns:
            self._signature_columns.append(PROBABILITY)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        inputs = dict(inputs)
        probability = inputs.pop(PROBABILITY)
        if return_outputs:
            raise NotImplementedError("Evaluation outputs of a soft-label trainer.")
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**given, labels=labels, use_cache=False, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = self.compute_ref_log_probs(self.ref_model or model, inputs)
        loss = soft_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, probability, beta=self.beta)
        gained = self.beta * (chosen - ref_chosen).detach(), self.beta * (rejected - ref_rejected).detach()
        self._total_train_tokens += int(self.accelerator.gather(inputs["attention_mask"].sum()).sum())
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["num_tokens"] = [self._total_train_tokens]
        for name, value in {
            "rewards/chosen": gained[0],
            "rewards/rejected": gained[1],
            "rewards/margins": gained[0] - gained[1],
            "rewards/accuracies": (gained[0] > gained[1]).float(),
        }.items():
            metrics[name].append(self.accelerator.gather(value).mean().item())
        return loss.mean()


class SoftRewardTrainer(trl.RewardTrainer):  # type: ignore[misc]
    """``RewardTrainer`` with the column ``probability``: cross-entropy of the Bradley-Terry model with soft labels."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PROBABILITY not in self._signature_columns:
            self._signature_columns.append(PROBABILITY)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        probability = inputs.pop(PROBABILITY)
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        loss = soft_preference_loss((chosen - rejected).float(), probability).mean()
        return (loss, outputs) if return_outputs else loss


class RewardedGRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` whose prompts are encoded as everywhere else in Charter, with rewards that may be ``None``.

    TRL prints the prompt and the answer that nothing scored; this one counts them (``unscored`` in the history).
    """

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        encoded = [templates.encode(self.processing_class, Conversation.parse(prompt)) for prompt in prompts]
        return encoded, None, {}

    def _calculate_rewards(self, _: Any, prompts: list[Any], completions: list[Any], *__: Any) -> torch.Tensor:
        conversations = [Conversation.parse(prompt) for prompt in prompts]
        responses = [completion[-1]["content"].strip() for completion in completions]
        columns = []
        for reward in self.reward_funcs:
            found = reward(conversations, responses)
            if len(found) != len(responses):
                raise DataError(
                    f"A reward gave {len(found)} values for {len(responses)} answers.",
                    fix="Give one value an answer, None where it cannot be scored.",
                )
            columns.append([torch.nan if value is None else float(value) for value in found])
        rewards = self.accelerator.gather(
            torch.tensor(columns, dtype=torch.float32, device=self.accelerator.device).T.contiguous()
        )
        rewards = rewards.where(rewards.isfinite(), torch.nan)
        self._metrics["train" if self.model.training else "eval"]["unscored"].append(
            rewards.isnan().float().mean().item()
        )
        return neutral_rewards(rewards, group=self.num_generations)


@dataclass
class _SoftDPOCollator(DPOCollator):  # type: ignore[misc]
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().torch_call(examples), PROBABILITY: _probabilities(examples)}


@dataclass
class _SoftRewardCollator(RewardCollator):  # type: ignore[misc]
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**super().torch_call(examples), PROBABILITY: _probabilities(examples)}


def _probabilities(examples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([example[PROBABILITY] for example in examples], dtype=torch.float32)


def _named(reward: Reward, index: int) -> Reward:
    """The reward under a name of its own for TRL's log; the trainer calls it, TRL does not."""

    def function(conversations: list[Conversation], responses: list[str]) -> list[float | None]:
        return reward(conversations, responses)

    function.__name__ = f"reward_{index}"
    return function
