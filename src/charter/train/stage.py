"""What the training stages share: loading, encoding, arguments, resuming, merging and saving."""

from __future__ import annotations

import contextlib
import math
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as transformers_logging
from trl.trainer.reward_trainer import suppress_seqcls_warning

from charter.data import Conversation, Row
from charter.engine import templates
from charter.engine.base import Progress
from charter.engine.hf import load_tokenizer, pick_device, pick_dtype
from charter.errors import DataError, MissingExtraError, ModelError
from charter.train.checkpoints import Marker, claim, last_checkpoint, seconds_until, storage, tokens_until
from charter.train.rundir import stage_key
from charter.train.settings import TrainSettings

PROBABILITY = "probability"
LOGGERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class TrainResult:
    """What a training stage made.

    Args:
        model: folder with weights in safetensors, configuration and tokenizer.
        history: one entry an update: ``step``, ``loss``, ``grad_norm``, ``learning_rate`` and the trainer's own.
        tokens: tokens trained on, prompts included.
        seconds: wall time of training, without loading and merging, over all processes that took part.
        peak_memory: peak resident memory of this process so far, in bytes.
    """

    model: Path
    history: list[dict[str, float]]
    tokens: int
    seconds: float
    peak_memory: int


class Stage:
    """One training stage.

    Args:
        model: folder to start from.
        output: working folder; checkpoints stand below it, and the result in ``model``.
        settings: of the stage.
        seed: of the order of rows and of new weights.
        report_to: ``none``, ``tensorboard`` (into ``runs`` below ``output``) or ``wandb``.
        progress: called with 1 after each update.

    Raises:
        MissingExtraError: the package to report to is not installed.
    """

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
        self._seed, self._report_to, self._progress = seed, report_to, progress
        if report_to in LOGGERS and find_spec(report_to) is None:
            raise MissingExtraError(f"Logging to {report_to} needs its package.", fix=f"Run: pip install {report_to}")
        self._checkpoints = output / "checkpoints"
        self._device = pick_device()
        self._dtype = pick_dtype(settings.precision, self._device)
        self.tokenizer = load_tokenizer(model)

    def answers(self, rows: Sequence[Row]) -> Dataset:
        """Rows with ``prompt`` and ``response`` as ``input_ids`` and ``completion_mask`` (1 on the answer)."""
        encoded = []
        for row in _some(rows):
            prompt, answer = self.encode(row["prompt"], row["response"])
            if len(prompt) < self._settings.max_length:
                mask = [0] * len(prompt) + [1] * len(answer)
                encoded.append({"input_ids": prompt + answer, "completion_mask": mask})
        return self._dataset(encoded)

    def pairs(self, rows: Sequence[Row], *, whole: bool = False) -> Dataset:
        """Preference rows as ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and ``probability``.

        With ``whole``, answers stand behind their prompts, cut at ``max_length``, and there is no ``prompt_ids``.
        """
        limit = self._settings.max_length
        encoded = []
        for number, row in enumerate(_some(rows), start=1):
            probability = float(row.get(PROBABILITY, 1.0))
            if not 0 <= probability <= 1:
                raise DataError(f"Pair {number}: probability {probability} is not in [0, 1].", fix="Correct the row.")
            prompt, chosen = self.encode(row["prompt"], row["chosen"])
            _, rejected = self.encode(row["prompt"], row["rejected"])
            if len(prompt) >= limit:
                continue
            answers = {"chosen_ids": chosen, "rejected_ids": rejected}
            if whole:
                pair: Row = {name: (prompt + ids)[:limit] for name, ids in answers.items()}
            else:
                pair = {"prompt_ids": prompt, **answers}
            encoded.append({**pair, PROBABILITY: probability})
        return self._dataset(encoded)

    def prompts(self, rows: Sequence[Row], *, room: int) -> Dataset:
        """Rows with ``prompt`` as messages, without those that leave fewer than ``room`` tokens of ``max_length``."""
        conversations = [Conversation.parse(row["prompt"]) for row in _some(rows)]
        limit = self._settings.max_length - room
        return self._dataset(
            [
                {"prompt": conversation.to_list()}
                for conversation in conversations
                if len(templates.encode(self.tokenizer, conversation)) <= limit
            ]
        )

    def encode(self, prompt: object, response: object) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the answer to it (a string, or messages whose last is the answer)."""
        text = response[-1]["content"] if isinstance(response, list) and response else response
        if not isinstance(text, str) or not text.strip():
            raise DataError("A training row has an answer without text.", fix="Leave such rows out.")
        return templates.encode_turn(self.tokenizer, Conversation.parse(prompt), text)

    def load(self, *, classifier: bool = False, precise: bool = False) -> Any:
        """The start model in the precision of training, or in full precision."""
        dtype = torch.float32 if precise or self._settings.full else self._dtype
        kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        options: dict[str, Any] = {"num_labels": 1} if classifier else {}
        set_seed(self._seed)  # a classifier's head is new
        try:
            with suppress_seqcls_warning():
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
            output_dir=str(self._checkpoints),
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
            report_to="none" if self._report_to == "tensorboard" else self._report_to,
            seed=self._seed,
            data_seed=self._seed,
            **more,
        )

    def run(self, trainer: Any, data: Dataset, *, classifier: bool = False) -> TrainResult:
        """Train on ``data`` from the last whole checkpoint of the same work, then save the merged model.

        Raises:
            StorageError: a checkpoint or the model cannot be written.
        """
        with storage(self._output):
            claim(self._checkpoints, self._owner(trainer, data))
            resumed = last_checkpoint(self._checkpoints)
            if resumed and hasattr(trainer, "_total_train_tokens"):
                trainer._total_train_tokens = tokens_until(resumed)  # noqa: SLF001 - TRL starts it at zero again
            for weight in trainer.model.parameters():
                if weight.requires_grad:  # PEFT leaves a classifier's head in bf16, where small updates vanish
                    weight.data = weight.data.float()
            marker = Marker(seconds_until(resumed) if resumed else 0.0)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(marker)
            if self._progress:
                trainer.add_callback(_Steps(self._progress))
            if self._report_to == "tensorboard":  # in a folder that outlives the checkpoints
                from torch.utils.tensorboard import SummaryWriter

                trainer.add_callback(TensorBoardCallback(SummaryWriter(str(self._output / "runs"))))
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            seconds = marker.seconds
            final = self._output / "model"
            shutil.rmtree(final, ignore_errors=True)
            self._merged(trainer, classifier=classifier).save_pretrained(final)
            self.tokenizer.save_pretrained(final)
        history = [
            {name: float(value) for name, value in entry.items() if _is_number(value)}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        tokens = int(history[-1].get("num_tokens", 0)) if history else 0
        return TrainResult(final, history, tokens, seconds, _peak_memory())

    def _dataset(self, encoded: list[Row]) -> Dataset:
        if not encoded:
            raise DataError("Every prompt is as long as max_length.", fix="Raise max_length.")
        return Dataset.from_list(encoded)

    def _owner(self, trainer: Any, data: Dataset) -> str:
        """What a checkpoint depends on."""
        name, source = type(trainer).__name__, str(self._source.resolve())
        return stage_key(name, source, self._settings, self._seed, data.to_list())

    def _merged(self, trainer: Any, *, classifier: bool) -> Any:
        """The trained model with its adapters merged into full-precision weights."""
        if self._settings.full:
            return trainer.accelerator.unwrap_model(trainer.model)
        adapter = self._output / "adapter"
        trainer.model.save_pretrained(adapter)
        whole = peft.PeftModel.from_pretrained(self.load(classifier=classifier, precise=True), adapter)
        return whole.merge_and_unload()


class _Steps(TrainerCallback):  # type: ignore[misc]
    """Passes each update on."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        del args, state, control
        self._progress(1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and notices off the terminal, which shows our own."""
    bars = transformers_logging.is_progress_bar_enabled()
    data_bars = not datasets.are_progress_bars_disabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="(accelerate|peft|torch|transformers|trl)")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if data_bars:
            datasets.enable_progress_bars()


def _some(rows: Sequence[Row]) -> Sequence[Row]:
    if not rows:
        raise DataError("There are no rows to train on.", fix="Give at least one.")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
