from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from charter.data import Conversation
from charter.engine import Sampling
from charter.engine.hf import TransformersEngine
from charter.errors import DataError, MissingExtraError, ModelError, StorageError
from charter.evaluation import RewardScorer
from charter.train import trainer as training
from charter.train.stage import Stage, quiet
from charter.train.trainer import DPOSettings, GRPOSettings, LoraSettings, RewardSettings, SFTSettings, TrainResult

LORA = LoraSettings(rank=4, alpha=8)
ROWS = [
    {"prompt": f"What is number {number}?", "response": f"It is the number {number}, which follows {number - 1}."}
    for number in range(12)
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Say {word}."}],
        "chosen": [{"role": "assistant", "content": f"{word}, with pleasure."}],
        "rejected": [{"role": "assistant", "content": "no no no"}],
        "probability": 0.9,
    }
    for word in ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")
]


def likelihood(model: Path, rows: list[dict[str, Any]], column: str) -> float:
    engine = TransformersEngine(model, precision="fp32", device="cpu")
    texts = [row[column] if isinstance(row[column], str) else row[column][0]["content"] for row in rows]
    scores = engine.loglikelihood([Conversation.parse(row["prompt"]) for row in rows], texts)
    return sum(score.mean for score in scores) / len(scores)


@pytest.mark.parametrize("full", [False, True])
def test_sft_makes_the_answers_likelier(tiny_model: Path, tmp_path: Path, full: bool) -> None:
    settings = SFTSettings(learning_rate=1e-2, epochs=4, batch_size=4, lora=LORA, full=full, precision="fp32")
    result = training.train_sft(ROWS, tiny_model, tmp_path, settings, seed=0)
    assert likelihood(result.model, ROWS, "response") > likelihood(tiny_model, ROWS, "response") + 0.5
    assert [entry["step"] for entry in result.history] == list(range(1, 13))
    assert all({"loss", "grad_norm", "learning_rate"} <= entry.keys() for entry in result.history)
    assert result.tokens > 0
    assert not (tmp_path / "checkpoints").exists()
    assert list(result.model.glob("*.safetensors"))


def test_sft_counts_the_answer_alone(tiny_model: Path, tmp_path: Path) -> None:
    settings = SFTSettings(max_steps=1, batch_size=1, precision="fp32", lora=LORA, learning_rate=0.0)
    result = training.train_sft(ROWS[:1], tiny_model, tmp_path, settings, seed=0)
    engine = TransformersEngine(tiny_model, precision="fp32", device="cpu")
    score = engine.loglikelihood([Conversation.parse(ROWS[0]["prompt"])], [str(ROWS[0]["response"]) + "<|im_end|>"])[0]
    assert result.history[0]["loss"] == pytest.approx(-score.mean, abs=1e-3)


def test_dpo_moves_the_margin_towards_the_label(tiny_model: Path, tmp_path: Path) -> None:
    settings = DPOSettings(learning_rate=5e-3, epochs=4, batch_size=4, lora=LORA, precision="fp32")
    result = training.train_dpo(PAIRS, tiny_model, tmp_path, settings, seed=0)
    before = likelihood(tiny_model, PAIRS, "chosen") - likelihood(tiny_model, PAIRS, "rejected")
    after = likelihood(result.model, PAIRS, "chosen") - likelihood(result.model, PAIRS, "rejected")
    assert after > before
    assert result.history[-1]["rewards/margins"] > 0


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_soft_dpo_equals_trl_at_certain_labels(tiny_model: Path, tmp_path: Path, probability: float) -> None:
    """One step of ours against one of TRL's own trainer on the same pairs, swapped where the label is 0."""
    import peft
    import trl

    rows = [{**pair, "probability": probability} for pair in PAIRS[:4]]
    settings = DPOSettings(learning_rate=1e-2, max_steps=4, batch_size=4, lora=LORA, precision="fp32")
    ours = training.train_dpo(rows, tiny_model, tmp_path / "ours", settings, seed=0)

    stage = Stage(tiny_model, tmp_path / "trl", settings, 0, "none", None)
    swapped = [row if probability else {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]

    class Encoded(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset.remove_columns(["probability"])

    with quiet():
        theirs = Encoded(
            model=stage.load(),
            args=stage.arguments(trl.DPOConfig, max_length=settings.max_length, beta=settings.beta),
            train_dataset=stage.pairs(swapped),
            processing_class=stage.tokenizer,
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear"),
        )
        theirs.train()
    expected = [entry["loss"] for entry in theirs.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in ours.history] == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) == 3  # the first update has no learning rate yet


def test_reward_model_learns_the_labels(tiny_model: Path, tmp_path: Path) -> None:
    settings = RewardSettings(learning_rate=1e-2, epochs=6, batch_size=4, lora=LORA, precision="fp32")
    result = training.train_reward(PAIRS, tiny_model, tmp_path, settings, seed=0)
    assert AutoModelForSequenceClassification.from_pretrained(result.model).config.num_labels == 1
    scorer = RewardScorer(result.model)
    prompts = [Conversation.parse(pair["prompt"]) for pair in PAIRS]
    chosen = scorer.score(prompts, [pair["chosen"][0]["content"] for pair in PAIRS])
    rejected = scorer.score(prompts, [pair["rejected"][0]["content"] for pair in PAIRS])
    assert all(a.value > b.value for a, b in zip(chosen, rejected, strict=True))  # type: ignore[operator]


def test_grpo_follows_the_reward(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def short(conversations: list[Conversation], responses: list[str]) -> list[float | None]:
        assert all(item.messages[-1].role == "user" for item in conversations)
        seen.append(len(responses))
        return [None if index == 0 else -float(len(text)) for index, text in enumerate(responses)]

    settings = GRPOSettings(max_steps=2, batch_size=8, generations=4, max_new_tokens=6, lora=LORA, precision="fp32")
    result = training.train_grpo(ROWS, tiny_model, tmp_path, settings, rewards=[short], seed=0)
    assert sum(seen) == 16
    assert all("reward" in entry for entry in result.history)
    AutoModelForCausalLM.from_pretrained(result.model)


def test_merged_weights_are_the_trained_policy(tiny_model: Path, tmp_path: Path) -> None:
    settings = SFTSettings(learning_rate=1e-2, max_steps=2, batch_size=4, lora=LORA, precision="fp32")
    result = training.train_sft(ROWS, tiny_model, tmp_path, settings, seed=0)
    before = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all("proj" in name for name in changed)
    TransformersEngine(result.model).generate([Conversation.user("Hi")], Sampling(max_new_tokens=2), seeds=[0])


CHILD = """
import json, os, signal, sys
from pathlib import Path
from charter.train import trainer
steps = 0
def progress(count):
    global steps
    steps += count
    if steps == 5:
        os.kill(os.getpid(), signal.SIGKILL)
settings = trainer.SFTSettings(**json.loads(sys.argv[4]), lora=trainer.LoraSettings(rank=4, alpha=8))
trainer.train_sft(json.loads(sys.argv[3]), Path(sys.argv[1]), Path(sys.argv[2]), settings, seed=0, progress=progress)
"""


def test_killed_training_continues_with_the_same_losses(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "learning_rate": 1e-2,
        "epochs": 3,
        "batch_size": 4,
        "save_steps": 3,
        "precision": "fp32",
    }
    settings = SFTSettings(**options, lora=LORA)
    whole = training.train_sft(ROWS, tiny_model, tmp_path / "whole", settings, seed=0)

    folder = tmp_path / "killed"
    arguments = [str(tiny_model), str(folder), json.dumps(ROWS), json.dumps(options)]
    killed = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half = folder / "checkpoints" / "checkpoint-99"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    steps: list[int] = []
    again = training.train_sft(ROWS, tiny_model, folder, settings, seed=0, progress=steps.append)
    assert len(steps) == 9 - 3
    assert losses(again) == pytest.approx(losses(whole), abs=1e-4)
    assert again.tokens == whole.tokens


class Interrupted(Exception):  # noqa: N818 - stands for a kill
    pass


def interrupt(at: int) -> Callable[[int], None]:
    steps: list[int] = []

    def progress(_: int) -> None:
        steps.append(1)
        if len(steps) == at:
            raise Interrupted

    return progress


def losses(result: TrainResult) -> list[float]:
    return [entry["reward"] if "reward" in entry else entry["loss"] for entry in result.history]


def shortness(_: list[Conversation], responses: list[str]) -> list[float | None]:
    return [None if index == 0 else -float(len(text)) for index, text in enumerate(responses)]


@pytest.mark.parametrize("name", ["dpo", "reward", "grpo"])
def test_interrupted_stages_continue(tiny_model: Path, tmp_path: Path, name: str) -> None:
    common: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": 4, "save_steps": 2, "lora": LORA, "precision": "fp32"}

    def train(folder: str, **more: Any) -> TrainResult:
        output = tmp_path / folder
        if name == "dpo":
            return training.train_dpo(PAIRS, tiny_model, output, DPOSettings(**common), seed=0, **more)
        if name == "reward":
            return training.train_reward(PAIRS, tiny_model, output, RewardSettings(**common), seed=0, **more)
        settings = GRPOSettings(**common, batch_size=8, max_new_tokens=4)
        return training.train_grpo(PAIRS, tiny_model, output, settings, rewards=[shortness], seed=0, **more)

    whole = train("whole")
    with pytest.raises(Interrupted):
        train("broken", progress=interrupt(3))
    again = train("broken")
    assert losses(again) == pytest.approx(losses(whole), rel=1e-3)
    assert again.tokens == whole.tokens


def test_checkpoints_of_other_work_are_not_continued(tiny_model: Path, tmp_path: Path) -> None:
    settings = SFTSettings(max_steps=3, batch_size=2, save_steps=1, lora=LORA, precision="fp32")
    with pytest.raises(Interrupted):
        training.train_sft(ROWS, tiny_model, tmp_path, settings, seed=0, progress=interrupt(2))
    assert list((tmp_path / "checkpoints").glob("checkpoint-*"))
    steps: list[int] = []
    training.train_sft(ROWS[:6], tiny_model, tmp_path, settings, seed=0, progress=steps.append)
    assert len(steps) == 3


def test_packing_keeps_rows_apart(tiny_model: Path, tmp_path: Path) -> None:
    """One packed sequence has the loss of its rows one by one."""

    def loss(packing: bool) -> float:
        settings = SFTSettings(
            learning_rate=0.0,
            max_steps=1,
            batch_size=1 if packing else 12,
            packing=packing,
            precision="fp32",
            lora=LORA,
        )
        return training.train_sft(ROWS, tiny_model, tmp_path / str(packing), settings, seed=0).history[0]["loss"]

    assert loss(packing=True) == pytest.approx(loss(packing=False), rel=1e-5)


def test_a_model_without_pad_token_and_template_in_bf16(tiny_model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    common: dict[str, Any] = {"max_steps": 2, "lora": LORA, "precision": "bf16", "learning_rate": 1e-2}
    sft = training.train_sft(ROWS, base, tmp_path / "sft", SFTSettings(**common), seed=0)
    reward = training.train_reward(PAIRS, base, tmp_path / "reward", RewardSettings(**common), seed=0)
    for result, kind in ((sft, AutoModelForCausalLM), (reward, AutoModelForSequenceClassification)):
        weights = kind.from_pretrained(result.model).state_dict()
        assert weights["model.embed_tokens.weight"].shape[0] == len(tokenizer)
        assert all(torch.isfinite(value).all() for value in weights.values())
    assert weights["score.weight"].dtype == torch.float32


def test_training_says_nothing_by_itself(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    settings = GRPOSettings(max_steps=1, batch_size=4, max_new_tokens=2, lora=LORA)
    training.train_grpo(ROWS, tiny_model, tmp_path, settings, rewards=[lambda _, texts: [None] * len(texts)], seed=0)
    out, err = capfd.readouterr()
    assert not out + err + caplog.text


def test_a_full_disk_is_a_storage_error(tiny_model: Path, tmp_path: Path) -> None:
    """The kernel refuses files over 64 KiB, as it refuses any on a full disk."""
    settings = SFTSettings(max_steps=2, batch_size=2, save_steps=1, lora=LORA, precision="fp32")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            training.train_sft(ROWS, tiny_model, tmp_path, settings, seed=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert training.train_sft(ROWS, tiny_model, tmp_path, settings, seed=0).history


def test_errors_say_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        training.train_sft([], tiny_model, tmp_path, SFTSettings(), seed=0)
    with pytest.raises(DataError, match="without text"):
        training.train_sft([{"prompt": "a", "response": " "}], tiny_model, tmp_path, SFTSettings(), seed=0)
    with pytest.raises(DataError, match="not in"):
        training.train_dpo([{**PAIRS[0], "probability": 2}], tiny_model, tmp_path, DPOSettings(), seed=0)
    with pytest.raises(ModelError):
        training.train_sft(ROWS, tmp_path, tmp_path, SFTSettings(), seed=0)
    with pytest.raises(DataError, match="max_length"):
        training.train_dpo(PAIRS, tiny_model, tmp_path, DPOSettings(max_length=4), seed=0)
    with pytest.raises(MissingExtraError, match="needs its package"):
        training.train_sft(ROWS, tiny_model, tmp_path, SFTSettings(), seed=0, report_to="wandb")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFTSettings(batch_size=0), "batch_size"),
        (lambda: DPOSettings(beta=0.0), "beta"),
        (lambda: GRPOSettings(generations=1), "generations"),
        (lambda: GRPOSettings(batch_size=6, generations=4), "multiple"),
        (lambda: LoraSettings(rank=0), "rank"),
    ],
)
def test_settings_are_checked(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
