"""A policy as an OpenVINO model: INT8 weights, stateful key/value cache, ready for continuous batching.

The graph is built operator by operator from the checkpoint's weights (:func:`build`), so the export needs no tracing
and no further package. It knows decoders of the Llama shape (Llama, Mistral, SmolLM, Qwen2, Qwen3: RMS norm, rotary
positions, grouped-query attention, gated MLP). It runs in a process of its own (:func:`export`): what it loads is gone
when it ends, and a fault in it cannot take the caller along.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from charter.engine.models import digest_folder
from charter.errors import EngineError, ModelError, StorageError

PARTIAL = ".partial-"
"""How the name of an unfinished export begins."""

VERSION = "1"
"""Part of the cache key; raised when the graph changes."""

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""``model_type`` values that :func:`build` knows."""

ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary positions whose frequencies are the same for every text."""

MISTRAL_WINDOW = 4096
"""Sliding window of a Mistral configuration that names none."""

STALE = 3600.0
"""Seconds after which an unfinished export is what a killed process left."""

MASKED = -65504.0
"""Added to attention scores that must not count; the lowest number of half precision."""


def supports(folder: Path) -> bool:
    """Whether the model in a folder can be exported.

    What the graph does not have is refused: sliding windows shorter than the context, rotary frequencies that change
    with the length of the text, activations other than SiLU, quantised checkpoints.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    kind = config.get("model_type")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # A Mistral checkpoint that names no window has one of 4096 tokens.
    window = config.get("sliding_window", MISTRAL_WINDOW) if kind == "mistral" else None
    return (
        kind in MODEL_TYPES
        and not config.get("use_sliding_window")
        and (window is None or window >= config.get("max_position_embeddings", math.inf))
        and (rope.get("rope_type") or rope.get("type") or "default") in ROPE_TYPES
        and config.get("hidden_act", "silu") in {"silu", "swish"}
        and "quantization_config" not in config
    )


def export(source: Path, cache: Path) -> Path:
    """Export a model folder, or find an earlier export of the same weights.

    Args:
        source: model folder with safetensors.
        cache: folder that keeps exports, each under the digest of its weights.

    Returns:
        A folder with ``openvino_model.xml`` and ``.bin``.

    Raises:
        ModelError: a model of another shape, or a failed export.
        StorageError: a cache folder that cannot be written.
    """
    if not supports(source):
        raise ModelError(
            f"{source} is not a model that can be exported to OpenVINO.", fix="Set engine.kind to `transformers`."
        )
    final = cache / f"openvino-int8-v{VERSION}-{digest_folder(source)[:16]}"
    if final.exists():
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{PARTIAL}{final.name}-"))
    except OSError as error:
        raise StorageError(f"{cache} cannot be written: {error.strerror}.", fix="Set CHARTER_CACHE.") from error
    try:
        command = [sys.executable, "-m", "charter.engine.export", str(source), str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own module
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
            raise ModelError(f"{source} could not be exported: {reason}", fix="Set engine.kind to `transformers`.")
        try:
            partial.rename(final)
        except OSError as error:
            if not final.exists():  # else another process was first, with the same bytes
                raise StorageError(f"{cache} cannot be written: {error.strerror}.", fix="Set CHARTER_CACHE.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _sweep(cache: Path) -> None:
    """Remove what killed exports left behind."""
    for folder in cache.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > STALE:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Shape:
    """The sizes that the graph needs, as the checkpoint's configuration states them."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    epsilon: float
    tied: bool


def build(config: Any, weights: Mapping[str, np.ndarray], inverse_frequencies: np.ndarray, scaling: float) -> Any:
    """The OpenVINO model of a Llama-shaped decoder.

    Args:
        config: the checkpoint's ``PretrainedConfig``.
        weights: name -> float32 array, as in the checkpoint's state dict.
        inverse_frequencies: rotary frequencies, shape ``(head_size / 2,)``.
        scaling: factor on the rotary cosines and sines.

    Returns:
        ``openvino.Model`` with inputs ``input_ids`` and ``attention_mask`` (batch, tokens), ``position_ids`` and
        ``beam_idx``, and output ``logits`` (batch, tokens, vocabulary).
    """
    heads = config.num_attention_heads
    shape = _Shape(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        epsilon=config.rms_norm_eps,
        tied=bool(config.tie_word_embeddings),
    )
    return _Graph(shape, weights).model(inverse_frequencies, scaling)


class _Graph:
    """Operators of one model under construction."""

    def __init__(self, shape: _Shape, weights: Mapping[str, np.ndarray]) -> None:
        import openvino as ov
        from openvino import opset13

        self._ov, self._op = ov, opset13
        self._shape, self._weights = shape, weights
        self._sinks: list[Any] = []

    def model(self, inverse_frequencies: np.ndarray, scaling: float) -> Any:
        ids = self._input("input_ids", [-1, -1], "i64")
        mask = self._input("attention_mask", [-1, -1], "i64")
        positions = self._input("position_ids", [-1, -1], "i64")
        beams = self._input("beam_idx", [-1], "i32")
        embedding = self._matrix("model.embed_tokens.weight")
        hidden = self._op.gather(embedding, ids, self._int(0))
        rotary = self._rotary(positions, inverse_frequencies, scaling)
        allowed = self._attention_mask(ids, mask)
        batch = self._op.gather(self._op.shape_of(ids), self._ints(0), self._int(0))
        for layer in range(self._shape.layers):
            hidden = self._layer(f"model.layers.{layer}", layer, hidden, rotary, allowed, beams, batch)
        hidden = self._norm("model.norm", hidden)
        head = embedding if self._shape.tied else self._matrix("lm_head.weight")
        logits = self._op.matmul(hidden, head, False, True)
        logits.output(0).set_names({"logits"})
        return self._ov.Model([self._op.result(logits)], self._sinks, [ids, mask, positions, beams], "charter_policy")

    def _input(self, name: str, sizes: list[int], kind: str) -> Any:
        parameter = self._op.parameter(self._ov.PartialShape(sizes), getattr(self._ov.Type, kind))
        parameter.set_friendly_name(name)  # the paged-attention pass finds the inputs by both names
        parameter.output(0).set_names({name})
        return parameter

    def _int(self, value: int) -> Any:
        return self._op.constant(np.int64(value))

    def _ints(self, *values: int) -> Any:
        return self._op.constant(np.array(values, dtype=np.int64))

    def _floats(self, values: np.ndarray) -> Any:
        return self._op.constant(np.ascontiguousarray(values, dtype=np.float32))

    def _matrix(self, name: str) -> Any:
        """A weight matrix in symmetric INT8, one scale a row, as a graph that the runtime keeps compressed."""
        weight = self._weights[name]
        scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127, np.finfo(np.float16).tiny)
        scale = scale.astype(np.float16)
        quantised = np.clip(np.rint(weight / scale.astype(np.float32)), -127, 127).astype(np.int8)
        halves = self._op.convert(self._op.constant(quantised), "f16")
        return self._op.convert(self._op.multiply(halves, self._op.constant(scale)), "f32")

    def _linear(self, name: str, value: Any) -> Any:
        result = self._op.matmul(value, self._matrix(f"{name}.weight"), False, True)
        bias = self._weights.get(f"{name}.bias")
        return result if bias is None else self._op.add(result, self._floats(bias))

    def _norm(self, name: str, value: Any) -> Any:
        square = self._op.reduce_mean(self._op.power(value, self._floats(np.array(2))), self._ints(-1), True)
        root = self._op.sqrt(self._op.add(square, self._floats(np.array(self._shape.epsilon))))
        scaled = self._op.multiply(value, self._op.divide(self._floats(np.array(1)), root))
        return self._op.multiply(scaled, self._floats(self._weights[f"{name}.weight"]))

    def _rotary(self, positions: Any, inverse_frequencies: np.ndarray, scaling: float) -> tuple[Any, Any]:
        """Cosines and sines of shape (batch, 1, tokens, head size)."""
        steps = self._op.unsqueeze(self._op.convert(positions, "f32"), self._ints(1, 3))
        half = self._op.multiply(steps, self._floats(inverse_frequencies.reshape(1, 1, 1, -1)))
        angles = self._op.concat([half, half], -1)
        cosines, sines = self._op.cos(angles), self._op.sin(angles)
        if scaling != 1:
            factor = self._floats(np.array(scaling))
            return self._op.multiply(cosines, factor), self._op.multiply(sines, factor)
        return cosines, sines

    def _attention_mask(self, ids: Any, mask: Any) -> Any:
        """Zero where a token may attend and :data:`MASKED` where not; shape (batch, 1, tokens, past + tokens)."""
        op = self._op
        new = op.gather(op.shape_of(ids), self._int(1), self._int(0))
        total = op.gather(op.shape_of(mask), self._int(1), self._int(0))
        keys = op.unsqueeze(op.range(self._int(0), total, self._int(1), "i64"), self._ints(0))
        queries = op.unsqueeze(op.range(op.subtract(total, new), total, self._int(1), "i64"), self._ints(1))
        causal = op.unsqueeze(op.less_equal(keys, queries), self._ints(0, 1))
        real = op.unsqueeze(op.greater(mask, self._int(0)), self._ints(1, 2))
        return op.select(op.logical_and(causal, real), self._floats(np.array(0)), self._floats(np.array(MASKED)))

    def _layer(
        self, name: str, number: int, hidden: Any, rotary: tuple[Any, Any], allowed: Any, beams: Any, batch: Any
    ) -> Any:
        value = self._norm(f"{name}.input_layernorm", hidden)
        hidden = self._op.add(
            hidden, self._attention(f"{name}.self_attn", number, value, rotary, allowed, beams, batch)
        )
        value = self._norm(f"{name}.post_attention_layernorm", hidden)
        gate = self._op.swish(self._linear(f"{name}.mlp.gate_proj", value))
        up = self._linear(f"{name}.mlp.up_proj", value)
        return self._op.add(hidden, self._linear(f"{name}.mlp.down_proj", self._op.multiply(gate, up)))

    def _attention(
        self, name: str, number: int, value: Any, rotary: tuple[Any, Any], allowed: Any, beams: Any, batch: Any
    ) -> Any:
        shape, op = self._shape, self._op
        query = self._rotate(self._heads(f"{name}.q_proj", value, shape.heads, f"{name}.q_norm"), rotary)
        key = self._rotate(self._heads(f"{name}.k_proj", value, shape.kv_heads, f"{name}.k_norm"), rotary)
        keys = self._cached(f"past_key_values.{number}.key", key, beams, batch)
        values = self._cached(
            f"past_key_values.{number}.value", self._heads(f"{name}.v_proj", value, shape.kv_heads), beams, batch
        )
        attended = op.scaled_dot_product_attention(query, self._repeat(keys), self._repeat(values), allowed)
        merged = op.reshape(
            op.transpose(attended, self._ints(0, 2, 1, 3)), self._ints(0, 0, shape.heads * shape.head_size), True
        )
        return self._linear(f"{name}.o_proj", merged)

    def _heads(self, name: str, value: Any, count: int, norm: str | None = None) -> Any:
        """Projection split into heads: (batch, heads, tokens, head size)."""
        split = self._op.reshape(self._linear(name, value), self._ints(0, 0, count, self._shape.head_size), True)
        if norm and f"{norm}.weight" in self._weights:
            split = self._norm(norm, split)
        return self._op.transpose(split, self._ints(0, 2, 1, 3))

    def _rotate(self, value: Any, rotary: tuple[Any, Any]) -> Any:
        op, half = self._op, self._shape.head_size // 2
        first = op.slice(value, self._ints(0), self._ints(half), self._ints(1), self._ints(3))
        second = op.slice(value, self._ints(half), self._ints(2 * half), self._ints(1), self._ints(3))
        turned = op.concat([op.multiply(second, self._floats(np.array(-1))), first], -1)
        return op.add(op.multiply(value, rotary[0]), op.multiply(turned, rotary[1]))

    def _cached(self, name: str, new: Any, beams: Any, batch: Any) -> Any:
        """The cache of keys or values with the new tokens at its end; the cache is a variable of the model."""
        ov, op = self._ov, self._op
        sizes = [-1, self._shape.kv_heads, -1, self._shape.head_size]
        info = ov.op.util.VariableInfo()
        info.data_shape, info.data_type, info.variable_id = ov.PartialShape(sizes), ov.Type.f32, name
        variable = ov.op.util.Variable(info)
        empty_shape = op.concat([batch, self._ints(self._shape.kv_heads, 0, self._shape.head_size)], 0)
        empty = op.broadcast(self._floats(np.array(0)), empty_shape)
        past = op.gather(op.read_value(empty, variable), beams, self._int(0))
        joined = op.concat([past, new], 2)
        self._sinks.append(op.assign(joined, variable))
        return joined

    def _repeat(self, value: Any) -> Any:
        """Key/value heads repeated for their group of query heads."""
        shape, op = self._shape, self._op
        group = shape.heads // shape.kv_heads
        if group == 1:
            return value
        sizes = op.shape_of(value)
        batch = op.gather(sizes, self._ints(0), self._int(0))
        length = op.gather(sizes, self._ints(2), self._int(0))
        wide = op.concat([batch, self._ints(shape.kv_heads, group), length, self._ints(shape.head_size)], 0)
        spread = op.broadcast(op.unsqueeze(value, self._ints(2)), wide, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(spread, self._ints(0, shape.heads, -1, shape.head_size), True)


def main(source: Path, target: Path) -> None:
    """Load a checkpoint with Transformers, build its graph and save it; runs in the export process."""
    import openvino as ov
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, use_safetensors=True)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    rotary = model.model.rotary_emb
    graph = build(model.config, weights, rotary.inv_freq.numpy(), float(rotary.attention_scaling))
    ov.save_model(graph, str(target / "openvino_model.xml"), compress_to_fp16=False)


if __name__ == "__main__":
    if len(sys.argv) != 3:  # noqa: PLR2004 - program, source, target
        raise EngineError("usage: python -m charter.engine.export SOURCE TARGET")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
