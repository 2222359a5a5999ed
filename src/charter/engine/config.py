"""Which engine to use, and how to make it."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from charter.engine.base import Engine
from charter.errors import EngineError, MissingExtraError

Kind = Literal["auto", "transformers", "openvino", "http"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine's settings.

    Args:
        kind: ``auto`` takes OpenVINO on a CPU where it is installed, else Transformers.
        precision: of Transformers; ``auto`` is bf16 where the device has it.
        device: of Transformers; ``auto`` is a GPU where there is one.
        batch_tokens: of Transformers: rows x tokens of one batch at most.
        base_url: of an OpenAI-compatible server, for example ``http://localhost:8000/v1``.
        model: name of the model on that server.
        api_key_env: environment variable that holds the server's key.
        concurrency: requests under way at once.
        timeout: seconds that a request may take.
        retries: further tries of a failed request.
    """

    kind: Kind = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    batch_tokens: int = 16_384
    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 4


def load_engine(config: EngineConfig, model: Path) -> Engine:
    """Make an engine for a model folder (an HTTP engine serves its own model and ignores the folder).

    Raises:
        EngineError: settings that do not fit together.
        MissingExtraError: an engine whose packages are not installed.
        ModelError: a model that cannot be loaded.
    """
    kind = engine_kind(config, model)
    if kind == "http":
        return _http(config)
    if kind == "openvino":
        return _openvino(model)
    if not importlib.util.find_spec("transformers"):
        raise MissingExtraError("This engine needs Transformers.", fix="pip install 'charter[train]'")
    from charter.engine.hf import TransformersEngine

    return TransformersEngine(model, precision=config.precision, device=config.device, batch_tokens=config.batch_tokens)


def engine_kind(config: EngineConfig, model: Path) -> Kind:
    """The kind that :func:`load_engine` would make: ``auto`` resolved for this machine and model."""
    if config.kind != "auto":
        return config.kind
    if config.base_url:
        return "http"
    if config.device not in {"auto", "cpu"} or not importlib.util.find_spec("openvino_genai"):
        return "transformers"
    if config.device == "auto":
        from charter.engine.hf import pick_device

        if pick_device().type != "cpu":
            return "transformers"
    from charter.engine.export import supports

    return "openvino" if supports(model) else "transformers"


def _openvino(model: Path) -> Engine:
    if not importlib.util.find_spec("openvino_genai"):
        raise MissingExtraError("This engine needs OpenVINO GenAI.", fix="pip install 'charter[openvino]'")
    from charter.engine.export import export
    from charter.engine.models import cache_folder
    from charter.engine.openvino import OpenVINOEngine

    return OpenVINOEngine(export(model, cache_folder() / "exports"), model)


def _http(config: EngineConfig) -> Engine:
    if not importlib.util.find_spec("openai"):
        raise MissingExtraError("This engine needs the openai client.", fix="pip install 'charter[http]'")
    if not config.base_url or not config.model:
        raise EngineError("An HTTP engine needs a server and a model.", fix="Set engine.base_url and engine.model.")
    from charter.engine.http import HTTPEngine

    return HTTPEngine(
        config.base_url,
        config.model,
        api_key=os.environ.get(config.api_key_env),
        concurrency=config.concurrency,
        timeout=config.timeout,
        retries=config.retries,
    )
