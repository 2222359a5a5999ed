"""Tokens a second and peak memory of a training stage against TRL's own trainer on the same rows and settings.

Each side runs in a process of its own, in turn; the ratio is the median over pairs. Charter's stage is measured
from its first to its last update, TRL's likewise. One JSON line a result::

    python benchmarks/training.py >> benchmarks/results/training.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from charter import resources
from charter.data import read_jsonl
from charter.engine.models import resolve
from charter.train import trainer
from charter.train.settings import DPOSettings, SFTSettings

STEPS = 6
SFT = SFTSettings(max_steps=STEPS, save_steps=1000)
DPO = DPOSettings(max_steps=STEPS, save_steps=1000)


def rows(stage: str) -> list[dict[str, Any]]:
    helpful = [row for row in read_jsonl(resources.path("helpful.jsonl")) if row["response"]]
    if stage == "sft":
        return helpful
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["response"]}],
            "rejected": [{"role": "assistant", "content": other["response"]}],
            "probability": 1.0,
        }
        for row, other in zip(helpful, [*helpful[1:], helpful[0]], strict=True)
    ]


def charter_side(stage: str, model: Path, folder: Path) -> list[dict[str, float]]:
    train = trainer.train_sft if stage == "sft" else trainer.train_dpo
    return train(rows(stage), model, folder, SFT if stage == "sft" else DPO, seed=0).history


def trl_side(stage: str, model: Path, folder: Path) -> list[dict[str, float]]:
    """TRL as its documentation shows it, with the settings that Charter passes."""
    import peft
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from charter.engine.hf import pick_device, pick_dtype

    settings: Any = SFT if stage == "sft" else DPO
    dtype = pick_dtype("auto", pick_device())
    shared: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "max_steps": STEPS,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "max_length": settings.max_length,
        "bf16": str(dtype) == "torch.bfloat16",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    data = rows(stage)
    if stage == "sft":
        data = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            }
            for row in data
        ]
    kind, config = (trl.SFTTrainer, trl.SFTConfig) if stage == "sft" else (trl.DPOTrainer, trl.DPOConfig)
    lora = settings.lora
    made = kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        args=config(**shared),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.target_modules
        ),
    )
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


def child(side: str, stage: str) -> None:
    stamps: list[float] = []
    from transformers.trainer_callback import DefaultFlowCallback

    flow = DefaultFlowCallback.on_step_end

    def step(self: Any, *given: Any, **named: Any) -> Any:
        stamps.append(time.perf_counter())
        return flow(self, *given, **named)

    DefaultFlowCallback.on_step_end = step
    model = resolve("default").path
    with tempfile.TemporaryDirectory() as folder:
        history = (charter_side if side == "charter" else trl_side)(stage, model, Path(folder))
    tokens = history[-1]["num_tokens"] - history[0]["num_tokens"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print("RESULT " + json.dumps({"tokens_s": tokens / (stamps[-1] - stamps[0]), "peak_gb": peak}))


def spawn(side: str, stage: str) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", side, "--stage", stage], capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, float] = json.loads(line[7:])
            return found
    raise SystemExit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--pairs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.stage)
        return
    for stage in ("sft", "dpo"):
        runs = [(spawn("charter", stage), spawn("trl", stage)) for _ in range(arguments.pairs)]
        ratios = [ours["tokens_s"] / theirs["tokens_s"] for ours, theirs in runs]
        result = {
            "benchmark": f"{stage} tokens a second",
            "charter": statistics.median(ours["tokens_s"] for ours, _ in runs),
            "trl": statistics.median(theirs["tokens_s"] for _, theirs in runs),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "peak_gb": max(ours["peak_gb"] for ours, _ in runs),
            "trl_peak_gb": max(theirs["peak_gb"] for _, theirs in runs),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
