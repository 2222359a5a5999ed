"""The training stages: rows in, a checkpoint out. TRL does the training; this module says what is trained on.

Rows are encoded by :mod:`charter.engine.templates`, the same that generation uses, and handed to TRL as token ids.
Adapters are merged into full-precision weights at the end, so a stage's result is a plain checkpoint folder.

A killed stage continues from its last checkpoint that carries a marker; the marker is written and flushed after the
checkpoint is whole, and a checkpoint without one is deleted.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.dpo_trainer import DataCollatorForPreference as DPOCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

from charter.data import Conversation, Row
from charter.engine import templates
from charter.engine.base import Progress
from charter.engine.hf import load_tokenizer, pick_device, pick_dtype
from charter.errors import DataError, ModelError
from charter.train.losses import soft_dpo_loss, soft_preference_loss
from charter.train.settings import DPOSettings, GRPOSettings, RewardSettings, SFTSettings, TrainSettings

Reward = Callable[[list[Conversation], list[str]], list[float | None]]
"""Conversations and answers in, one reward an answer out; ``None`` is unscored."""

MARKER = "complete"
PROBABILITY = "probability"


@dataclass(frozen=True)
class TrainResult:
    """What a training stage made.

    Args:
        model: folder with weights in safetensors, configuration and tokenizer.
        history: one entry a logged update: ``step``, ``loss``, ``grad_norm``, ``learning_rate`` and the trainer's own.
        tokens: tokens trained on, prompts included.
        seconds: wall time of training, without loading and saving.
        peak_memory: peak resident memory of this process in bytes.
    """

    model: Path
    history: list[dict[str, float]]
    tokens: int
    seconds: float
    peak_memory: int


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
    stage = _Stage(model, output, settings, seed, report_to, progress)
    encoded = []
    for prompt, answer in (stage.encode(row["prompt"], row["response"]) for row in _some(rows)):
        ids = prompt + answer
        encoded.append({"input_ids": ids, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    arguments = stage.arguments(
        trl.SFTConfig, max_length=settings.max_length, packing=settings.packing, completion_only_loss=True
    )
    trainer = trl.SFTTrainer(
        model=stage.load(),
        args=arguments,
        train_dataset=Dataset.from_list(encoded),
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("CAUSAL_LM"),
        callbacks=stage.callbacks,
    )
    return stage.run(trainer)


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
    stage = _Stage(model, output, settings, seed, report_to, progress)
    trainer = SoftDPOTrainer(
        model=stage.load(),
        args=stage.arguments(trl.DPOConfig, max_length=settings.max_length, beta=settings.beta),
        train_dataset=stage.pairs(rows),
        data_collator=_SoftDPOCollator(pad_token_id=stage.tokenizer.pad_token_id, max_length=settings.max_length),
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("CAUSAL_LM"),
        callbacks=stage.callbacks,
    )
    return stage.run(trainer)


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
    stage = _Stage(model, output, settings, seed, report_to, progress)
    data = stage.pairs(rows).map(
        lambda row: {name: row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")},
        remove_columns=["prompt_ids"],
    )
    trainer = SoftRewardTrainer(
        model=stage.load(classifier=True),
        args=stage.arguments(trl.RewardConfig, max_length=settings.max_length),
        train_dataset=data,
        data_collator=_SoftRewardCollator(pad_token_id=stage.tokenizer.pad_token_id),
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("SEQ_CLS"),
        callbacks=stage.callbacks,
    )
    return stage.run(trainer, classifier=True)


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
        rewards: their sum is maximised. An unscored answer counts as the mean of the others of its batch, so that it
            neither gains nor loses.
        seed: of the order of rows, of new weights and of sampling.
        report_to: ``none``, ``tensorboard`` or ``wandb``.
        progress: called with 1 after each update.
    """
    stage = _Stage(model, output, settings, seed, report_to, progress)
    prompts = [{"prompt": Conversation.parse(row["prompt"]).to_list()} for row in _some(rows)]
    trainer = _GRPOTrainer(
        model=stage.load(),
        reward_funcs=[_reward_function(reward, index) for index, reward in enumerate(rewards)],
        args=stage.arguments(
            trl.GRPOConfig,
            num_generations=settings.generations,
            max_completion_length=settings.max_new_tokens,
            temperature=settings.temperature,
            beta=settings.beta,
        ),
        train_dataset=Dataset.from_list(prompts),
        processing_class=stage.tokenizer,
        peft_config=stage.peft_config("CAUSAL_LM"),
        callbacks=stage.callbacks,
    )
    return stage.run(trainer)


# --- trainers ---------------------------------------------------------------------------------------------------------


class SoftDPOTrainer(trl.DPOTrainer):  # type: ignore[misc]
    """``DPOTrainer`` over encoded pairs with the column ``probability`` (Rafailov et al. 2023; see ``losses``)."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
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


class _GRPOTrainer(trl.GRPOTrainer):  # type: ignore[misc]
    """``GRPOTrainer`` whose prompts are encoded as everywhere else in Charter."""

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        encoded = [templates.encode(self.processing_class, Conversation.parse(prompt)) for prompt in prompts]
        return encoded, None, {}


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


def _reward_function(reward: Reward, index: int) -> Callable[..., list[float]]:
    """A reward as TRL calls it; an unscored answer gets the mean of the scored ones."""

    def function(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        found = reward([Conversation.parse(prompt) for prompt in prompts], [item[0]["content"] for item in completions])
        scored = [value for value in found if value is not None and math.isfinite(value)]
        mean = sum(scored) / len(scored) if scored else 0.0
        return [value if value is not None and math.isfinite(value) else mean for value in found]

    function.__name__ = f"reward_{index}"
    return function


# --- what the stages share --------------------------------------------------------------------------------------------


class _Stage:
    """One training stage: loads, encodes, trains, merges and saves."""

    def __init__(
        self,
        model: Path,
        output: Path,
        settings: TrainSettings,
        seed: int,
        report_to: str,
        progress: Progress | None,
    ) -> None:
        self._source, self._output, self._settings = model, output, settings
        self._seed, self._report_to = seed, report_to
        self._device = pick_device()
        self._dtype = pick_dtype(settings.precision, self._device)
        self.tokenizer = load_tokenizer(model)
        self.callbacks: list[TrainerCallback] = [_Marker(), *([_Steps(progress)] if progress else [])]

    def encode(self, prompt: object, response: object) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the answer to it (a string, or messages whose last is the answer)."""
        text = response[-1]["content"] if isinstance(response, list) and response else response
        if not isinstance(text, str) or not text.strip():
            raise DataError("A training row has an answer without text.", fix="Leave such rows out.")
        return templates.encode_turn(self.tokenizer, Conversation.parse(prompt), text)

    def pairs(self, rows: Sequence[Row]) -> Dataset:
        """Preference rows as ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``probability``."""
        encoded = []
        for number, row in enumerate(_some(rows), start=1):
            probability = float(row.get(PROBABILITY, 1.0))
            if not 0 <= probability <= 1:
                raise DataError(f"Pair {number}: probability {probability} is not in [0, 1].", fix="Correct the row.")
            prompt, chosen = self.encode(row["prompt"], row["chosen"])
            _, rejected = self.encode(row["prompt"], row["rejected"])
            if len(prompt) >= self._settings.max_length:
                continue
            encoded.append(
                {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, PROBABILITY: probability}
            )
        if not encoded:
            raise DataError("Every prompt is as long as max_length.", fix="Raise max_length.")
        return Dataset.from_list(encoded)

    def load(self, *, classifier: bool = False, precise: bool = False) -> Any:
        """The start model in the precision of training, or in full precision."""
        dtype = torch.float32 if precise or self._settings.full else self._dtype
        kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        options: dict[str, Any] = {"num_labels": 1} if classifier else {}
        try:
            model = kind.from_pretrained(self._source, dtype=dtype, use_safetensors=True, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{self._source} cannot be loaded for training.", fix="Check the folder.") from error
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def peft_config(self, task: str) -> Any:
        """Adapters as the settings say, or ``None`` for full fine-tuning."""
        if self._settings.full:
            return None
        lora = self._settings.lora
        return peft.LoraConfig(
            task_type=task,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
        )

    def arguments(self, kind: Any, **more: Any) -> Any:
        """The trainer's arguments."""
        settings = self._settings
        return kind(
            output_dir=str(self._output / "checkpoints"),
            learning_rate=settings.learning_rate,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            gradient_checkpointing=settings.gradient_checkpointing,
            max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup,
            bf16=self._dtype == torch.bfloat16,
            use_cpu=self._device.type == "cpu",
            logging_steps=1,
            save_strategy="steps",
            save_steps=settings.save_steps,
            save_total_limit=2,
            dataloader_pin_memory=self._device.type == "cuda",
            disable_tqdm=True,
            report_to=self._report_to,
            seed=self._seed,
            data_seed=self._seed,
            **more,
        )

    def run(self, trainer: Any, *, classifier: bool = False) -> TrainResult:
        """Train from the last whole checkpoint, then save the merged model."""
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(type(callback))
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=last_checkpoint(self._output / "checkpoints"))
        seconds = time.perf_counter() - began
        final = self._output / "model"
        shutil.rmtree(final, ignore_errors=True)
        self._merged(trainer, classifier=classifier).save_pretrained(final)
        self.tokenizer.save_pretrained(final)
        history = [
            {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        shutil.rmtree(self._output / "checkpoints", ignore_errors=True)
        tokens = int(history[-1].get("num_tokens", 0)) if history else 0
        return TrainResult(final, history, tokens, seconds, _peak_memory())

    def _merged(self, trainer: Any, *, classifier: bool) -> Any:
        """The trained model with its adapters merged into full-precision weights."""
        if self._settings.full:
            return trainer.accelerator.unwrap_model(trainer.model)
        adapter = self._output / "adapter"
        trainer.model.save_pretrained(adapter)
        whole = peft.PeftModel.from_pretrained(self.load(classifier=classifier, precise=True), adapter)
        return whole.merge_and_unload()


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint with a marker; those without one, half-written by a killed process, are deleted."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if (path / MARKER).exists():
            found.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path)
    return str(max(found)[1]) if found else None


class _Marker(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint as whole once everything in it is on disk."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del control
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        for path in (*folder.rglob("*"), folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        with (folder / MARKER).open("w", encoding="utf-8") as stream:
            stream.flush()
            os.fsync(stream.fileno())


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Passes each update on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del args, state, control
        self._progress(1)


def _some(rows: Sequence[Row]) -> Sequence[Row]:
    if not rows:
        raise DataError("There are no rows to train on.", fix="Give at least one.")
    return rows


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
