from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from charter.data import Conversation
from charter.engine import Sampling
from charter.engine.hf import TransformersEngine
from charter.errors import DataError, ModelError
from charter.evaluation import RewardScorer
from charter.train import trainer as training
from charter.train.settings import DPOSettings, GRPOSettings, LoraSettings, RewardSettings, SFTSettings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

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

    stage = training._Stage(tiny_model, tmp_path / "trl", settings, 0, "none", None)
    swapped = [row if probability else {**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]

    class Encoded(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset.remove_columns(["probability"])

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
import json, sys, os, signal
from pathlib import Path
from charter.train import trainer
from charter.train.settings import SFTSettings, LoraSettings
rows = json.loads(sys.argv[3])
steps = 0
def progress(count):
    global steps
    steps += count
    if steps == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
lora = LoraSettings(rank=4)
settings = SFTSettings(learning_rate=1e-2, epochs=4, batch_size=4, save_steps=3, precision="fp32", lora=lora)
result = trainer.train_sft(rows, Path(sys.argv[1]), Path(sys.argv[2]), settings, seed=0, progress=progress)
print(json.dumps([steps, [entry["loss"] for entry in result.history]]))
"""


def test_killed_training_continues_with_the_same_losses(tiny_model: Path, tmp_path: Path) -> None:
    def spawn(folder: str, die_at: int) -> subprocess.CompletedProcess[str]:
        arguments = [str(tiny_model), str(tmp_path / folder), json.dumps(ROWS), str(die_at)]
        return subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=False)

    whole = spawn("whole", -1)
    assert whole.returncode == 0, whole.stderr
    assert spawn("killed", 8).returncode == -9
    checkpoints = tmp_path / "killed" / "checkpoints"
    half = checkpoints / "checkpoint-99"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    again = spawn("killed", -1)
    assert again.returncode == 0, again.stderr
    steps, losses = json.loads(again.stdout.splitlines()[-1])
    assert steps == 12 - 6
    assert losses == pytest.approx(json.loads(whole.stdout.splitlines()[-1])[1], abs=1e-6)


def test_errors_say_what_to_do(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        training.train_sft([], tiny_model, tmp_path, SFTSettings(), seed=0)
    with pytest.raises(DataError, match="without text"):
        training.train_sft([{"prompt": "a", "response": " "}], tiny_model, tmp_path, SFTSettings(), seed=0)
    with pytest.raises(DataError, match="not in"):
        training.train_dpo([{**PAIRS[0], "probability": 2}], tiny_model, tmp_path, DPOSettings(), seed=0)
    with pytest.raises(ModelError):
        training.train_sft(ROWS, tmp_path, tmp_path, SFTSettings(), seed=0)


def test_unscored_rewards_are_neutral() -> None:
    function = training._reward_function(lambda _, texts: [None, 1.0, 3.0], 0)
    prompts = [[{"role": "user", "content": "a"}]] * 3
    completions = [[{"role": "assistant", "content": "b"}]] * 3
    assert function(prompts, completions, trainer_state=SimpleNamespace()) == [2.0, 1.0, 3.0]
