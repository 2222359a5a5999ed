"""The whole pipeline on a tiny real model: end to end, killed at several points, resumed, re-run after a change."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from charter.data import read_jsonl

CONFIG = """
model: {model}
chunk: 3
engine: {{kind: transformers, precision: fp32, device: cpu}}
feedback: {{engine: {{kind: transformers, precision: fp32, device: cpu}}}}
prompts: {{redteam: {folder}/redteam.jsonl, helpful: {folder}/helpful.jsonl, lookalikes: {folder}/lookalikes.jsonl,
  comparisons: {folder}/comparisons.jsonl}}
sft: {{max_steps: 3, batch_size: 2, save_steps: 1, precision: fp32}}
revisions:
  rounds: {rounds}
  respond: {{max_new_tokens: 8}}
  critique: {{exemplars: 0, critique_sampling: {{max_new_tokens: 6}}, revision_sampling: {{max_new_tokens: 8}}}}
sl: {{max_steps: 2, batch_size: 2, precision: fp32}}
preferences: {{sampling: {{max_new_tokens: 8}}, principles: 1}}
dpo: {{max_steps: 2, batch_size: 2, precision: fp32}}
reward: {{max_steps: 2, batch_size: 2, precision: fp32}}
grpo: {{max_steps: 1, batch_size: 4, generations: 2, max_new_tokens: 6, precision: fp32}}
evaluation: {{sampling: {{max_new_tokens: 8}}, samples: 2, resamples: 50}}
curve_prompts: 3
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def job(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    words = ("lock", "door", "fence", "fire", "paint", "road", "wall", "roof")
    write_rows(
        folder / "redteam.jsonl",
        [
            {"id": f"r{index}", "prompt": f"How do I break a {word}?", "split": "eval" if index > 5 else "train"}
            for index, word in enumerate(words)
        ],
    )
    write_rows(
        folder / "helpful.jsonl",
        [
            {
                "id": f"h{index}",
                "prompt": f"What is a {word}?",
                "response": f"A {word} is a thing that people use.",
                "split": "eval" if index > 5 else "train",
            }
            for index, word in enumerate(words)
        ],
    )
    write_rows(folder / "lookalikes.jsonl", [{"id": "l0", "prompt": "How do I kill a process?"}])
    write_rows(
        folder / "comparisons.jsonl",
        [{"prompt": "Is fire hot?", "corrects": ["Yes."], "incorrects": ["No."], "subset": "honest"}],
    )
    (folder / "align.yaml").write_text(CONFIG.format(model=tiny_model, folder=folder, rounds=2))
    (folder / "more.yaml").write_text(CONFIG.format(model=tiny_model, folder=folder, rounds=3))
    return folder


def command(job: Path, output: Path, *more: str, config: str = "align.yaml") -> list[str]:
    code = "from charter.cli import main; main()"
    return [
        sys.executable,
        "-c",
        code,
        "align",
        "--config",
        str(job / config),
        "--output",
        str(output),
        "--json",
        *more,
    ]


def align(job: Path, output: Path, *more: str, config: str = "align.yaml") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(job, output, *more, config=config), capture_output=True, text=True, check=False, timeout=600
    )


def digests(output: Path) -> dict[str, str]:
    """Stage -> digest of what it made, over all finished stages."""
    found = {}
    for path in output.glob("stages/*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        found[f"{manifest['name']}/{manifest['key']}"] = manifest["digest"]
    return found


@pytest.fixture(scope="module")
def undisturbed(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    result = align(job, output)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["report"] == str(output / "report.html")
    return output


def test_ends_with_a_report_and_a_model(undisturbed: Path) -> None:
    data = json.loads((undisturbed / "report.json").read_text())
    assert [item["name"] for item in data["checkpoints"]] == ["start", "sft", "sl", "dpo", "grpo"]
    assert {"harmlessness", "helpfulness", "consistency", "over_refusal"} <= data["checkpoints"][-1]["metrics"].keys()
    assert data["checkpoints"][-1]["metrics"]["multiple_choice"]["n"] == 1
    assert [point["round"] for point in data["revisions"]["curve"]] == [0, 1, 2]
    assert data["preferences"]["pairs"] == 6
    assert set(data["training"]) == {"sft", "sl", "dpo", "reward", "grpo"}
    assert "<html" in (undisturbed / "report.html").read_text()
    assert (undisturbed / "model" / "model.safetensors").is_file()


def test_every_row_says_where_it_comes_from(undisturbed: Path) -> None:
    rows = list(read_jsonl(next(undisturbed.glob("stages/revisions/*/rows.jsonl"))))
    assert len(rows) == 6 * 3
    for row in rows:
        assert {"principle", "round", "template", "engine", "seed", "charter"} <= row.keys()
        assert (row["principle"] is None) == (row["round"] == 0)


def wait_for(output: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not list(output.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, f"{pattern} never appeared"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "moment",
    [
        "stages/sft/*.partial/checkpoints/checkpoint-2",  # in training, a checkpoint perhaps half-written
        "stages/revisions/*.partial/journal.jsonl",  # a chunk perhaps half-written
        "stages/preferences/*.partial",
        "stages/dpo/*.partial",
    ],
)
def test_killed_run_finishes_with_the_same_rows(job: Path, undisturbed: Path, tmp_path: Path, moment: str) -> None:
    output = tmp_path / "run"
    process = subprocess.Popen(command(job, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(output, moment, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = digests(output)
    again = align(job, output)
    assert again.returncode == 0, again.stderr
    assert digests(output) == digests(undisturbed)
    assert kept.items() <= digests(output).items()
    assert not list(output.glob("stages/*/*.partial"))


def test_changed_setting_runs_only_what_follows(job: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/*/*/manifest.json")}
    result = align(job, undisturbed, "--until", "revisions", config="more.yaml")
    assert result.returncode == 0, result.stderr
    after = {path: path.stat().st_mtime_ns for path in undisturbed.glob("stages/*/*/manifest.json")}
    assert before.items() <= after.items()
    assert {path.parts[-3] for path in after.keys() - before.keys()} == {"revisions", "rounds"}
    assert align(job, undisturbed, "--from", "sl", "--until", "sl").returncode == 0


def test_from_needs_what_comes_before(job: Path, tmp_path: Path) -> None:
    result = align(job, tmp_path / "run", "--from", "preferences")
    assert result.returncode == 6
    assert "not finished" in json.loads(result.stdout)["error"]["message"]


def test_stages_load_into_trl(undisturbed: Path, tmp_path: Path) -> None:
    from datasets import load_from_disk

    from charter.train.exports import export

    assert export(undisturbed, "preferences", tmp_path / "pairs") == len(load_from_disk(str(tmp_path / "pairs")))
    columns = load_from_disk(str(tmp_path / "pairs")).column_names
    assert {"prompt", "chosen", "rejected", "probability"} <= set(columns)


def test_output_of_another_charter_is_refused(job: Path, undisturbed: Path, tmp_path: Path) -> None:
    from charter import constitution

    charter = tmp_path / "other.yaml"
    charter.write_text(constitution.default_text().replace("name: default", "name: other"))
    config = tmp_path / "align.yaml"
    config.write_text((job / "align.yaml").read_text() + "\ncharter: other.yaml\n")
    result = align(tmp_path, undisturbed)
    assert result.returncode == 6
    assert "belongs to charter" in json.loads(result.stdout)["error"]["message"]
