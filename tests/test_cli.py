from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def charter(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from charter.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        check=False,
    )


def test_init_then_check(tmp_path: Path) -> None:
    assert charter("init", cwd=tmp_path).returncode == 0
    checked = charter("check", "charter.yaml", "--json", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert len(json.loads(checked.stdout)["digest"]) == 64


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "charter.yaml").write_text("mine")
    assert charter("init", cwd=tmp_path).returncode != 0
    assert (tmp_path / "charter.yaml").read_text() == "mine"


def test_error_is_one_sentence_and_an_object(tmp_path: Path) -> None:
    result = charter("check", "absent.yaml", "--json", cwd=tmp_path)
    assert result.returncode == 2
    assert "absent.yaml" in json.loads(result.stdout)["error"]["message"]
    assert "Traceback" not in result.stderr


def test_help_loads_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys, charter.cli; print(sorted({'torch','transformers','trl','openvino','openai'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert result.stdout.strip() == "[]"
