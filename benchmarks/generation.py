"""Completed revisions a minute: one prompt at a time in full precision against Charter's engines.

The baseline is the loop that people write first: for each prompt three ``generate`` calls (answer, critique,
revision), batch of one, fp32. Charter does the same work (same model, prompts, instructions, sampling and token
limits, one round, no exemplars) through its stage. One JSON line a result; run on an otherwise idle machine::

    python benchmarks/generation.py --prompts 64 --baseline-prompts 8 >> benchmarks/results/generation.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from charter import constitution, resources
from charter.critique import CritiqueConfig
from charter.data import Conversation, Row, read_jsonl
from charter.engine import Engine, EngineConfig, Sampling, load_engine, templates
from charter.engine.models import resolve
from charter.train import revisions

TOKENS = 64
SAMPLING = Sampling(max_new_tokens=TOKENS, temperature=0.7)
CONFIG = revisions.RevisionsConfig(
    rounds=1,
    respond=SAMPLING,
    critique=CritiqueConfig(exemplars=0, critique_sampling=SAMPLING, revision_sampling=SAMPLING),
)


def baseline(path: Path, prompts: list[Row], charter: constitution.Charter) -> tuple[float, int]:
    """Seconds and generated tokens of the one-at-a-time loop."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    count = 0

    def write(conversation: Conversation) -> str:
        nonlocal count
        ids = torch.tensor([templates.encode(tokenizer, conversation)])
        with torch.no_grad():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=True,
                temperature=0.7,
                pad_token_id=tokenizer.eos_token_id,
            )
        count += output.shape[1] - ids.shape[1]
        return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)).strip()

    began = time.perf_counter()
    for row in prompts:
        principle, wording = revisions.draw(charter, 0, row["id"], 1)
        conversation = Conversation.parse(row["prompt"])
        conversation = conversation.add("assistant", write(conversation) or "-")
        conversation = conversation.add("user", principle.critique_request[wording])
        conversation = conversation.add("assistant", write(conversation) or "-")
        write(conversation.add("user", principle.revision_request[wording]))
    return time.perf_counter() - began, count


def ours(engine: Engine, prompts: list[Row], charter: constitution.Charter) -> tuple[float, int]:
    """Seconds and generated tokens of Charter's stage."""
    revisions.run(prompts[:2], engine, charter, CONFIG, seed=1)  # load and warm up
    engine.reset()
    began = time.perf_counter()
    rows = revisions.run(prompts, engine, charter, CONFIG, seed=0)
    return time.perf_counter() - began, sum(row["tokens"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--baseline-prompts", type=int, default=8)
    parser.add_argument("--model", default="default")
    arguments = parser.parse_args()
    path, charter = resolve(arguments.model).path, constitution.default()
    prompts = list(read_jsonl(resources.path("redteam.jsonl")))[: arguments.prompts]
    seconds, tokens = baseline(path, prompts[: arguments.baseline_prompts], charter)
    reference = arguments.baseline_prompts / seconds * 60
    shared = {
        "benchmark": "revisions a minute",
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    print(json.dumps({**shared, "engine": "one at a time, fp32", "value": reference, "tokens_s": tokens / seconds}))
    for kind in ("transformers", "openvino"):
        engine = load_engine(EngineConfig(kind=kind), path)
        seconds, tokens = ours(engine, prompts, charter)
        value = len(prompts) / seconds * 60
        result = {**shared, "engine": engine.name, "value": value, "tokens_s": tokens / seconds}
        print(json.dumps({**result, "ratio": value / reference}), flush=True)
        engine.close()


if __name__ == "__main__":
    main()
