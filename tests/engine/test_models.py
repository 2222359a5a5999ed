from __future__ import annotations

from pathlib import Path

import pytest

from charter.engine.models import digest_folder, resolve
from charter.errors import ModelError


def folder(path: Path, weights: bytes) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_digest_follows_the_weights_and_not_the_place(tmp_path: Path) -> None:
    one, same, other = (folder(tmp_path / name, data) for name, data in [("a", b"1"), ("b", b"1"), ("c", b"2")])
    assert digest_folder(one) == digest_folder(same) != digest_folder(other)
    assert resolve(str(one)).digest == digest_folder(one)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", b"1")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights"):
        resolve(str(path))


@pytest.mark.parametrize("name", ["./absent", "absent.gguf"])
def test_absent_path(name: str) -> None:
    with pytest.raises(ModelError, match="no model at"):
        resolve(name)


def test_broken_gguf_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF")
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match="cannot be converted"):
        resolve(str(path), cache=cache)
    assert list((cache / "models").iterdir()) == []
