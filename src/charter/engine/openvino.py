"""The fast engine on a CPU: OpenVINO GenAI's continuous batching over an INT8 export of the policy."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import openvino as ov
import openvino_genai as genai
from openvino import opset13

from charter.data import Conversation
from charter.engine import templates
from charter.engine.base import (
    Completion,
    Likelihood,
    LikelihoodEngine,
    Progress,
    Sampling,
    batches,
    combine_digests,
)
from charter.engine.models import digest_folder
from charter.errors import EngineError, ModelError

T = TypeVar("T")

SCORE_TOKENS = 8_192
"""Rows x tokens of one scoring batch at most."""


class OpenVINOEngine:
    """A policy in INT8; see :class:`charter.engine.base.LikelihoodEngine`.

    Args:
        export: folder that :func:`charter.engine.export.export` wrote.
        source: the model folder that it was exported from (tokenizer, configuration, digest).

    Raises:
        ModelError: an export that cannot be loaded.
    """

    name = "openvino int8"

    def __init__(self, export: Path, source: Path) -> None:
        from charter.engine.hf import load_tokenizer

        self._export = export
        self.tokenizer = load_tokenizer(source)
        config = json.loads((source / "config.json").read_text("utf-8"))
        self.context = int(config.get("max_position_embeddings") or 1 << 20)
        self._ends = _end_tokens(source, config, self.tokenizer)
        self.digest = combine_digests("openvino", ov.__version__, "int8", export.name, digest_folder(source))
        self._pipeline: Any = None
        self._scorer: Any = None

    def close(self) -> None:
        """Free the weights."""
        self._pipeline = self._scorer = None

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """See :meth:`charter.engine.base.Engine.generate`."""
        prompts = self._encode(conversations, sampling.max_new_tokens)
        if not prompts:
            return []
        inputs = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        configs = [self._config(sampling, seed) for seed in seeds]
        try:
            results = self._generator().generate(inputs, configs)
        except RuntimeError as error:
            self._pipeline = None
            raise EngineError(f"OpenVINO failed to generate: {str(error).splitlines()[0]}.") from error
        stops = (*sampling.stop, *templates.stops(self.tokenizer))
        done = [self._completion(result, len(prompt), stops) for result, prompt in zip(results, prompts, strict=True)]
        if progress:
            progress(len(done))
        return done

    def _completion(self, result: Any, prompt: int, stops: tuple[str, ...]) -> Completion:
        tokens = list(result.m_generation_ids[0])
        ended = bool(tokens) and tokens[-1] in self._ends
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
        cut = min((position for stop in stops if (position := text.find(stop)) >= 0), default=None)
        reason = "stop" if ended or cut is not None else "length"
        return Completion(text[:cut].strip(), "stop" if reason == "stop" else "length", prompt, len(tokens))

    def _config(self, sampling: Sampling, seed: int) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = sampling.max_new_tokens
        config.repetition_penalty = float(sampling.repetition_penalty)
        if self._ends:
            config.eos_token_id = min(self._ends)
            config.stop_token_ids = self._ends
        else:
            config.ignore_eos = True
        if sampling.temperature > 0:
            config.do_sample = True
            config.temperature = float(sampling.temperature)
            config.top_p = float(sampling.top_p)
            if sampling.top_k:
                config.top_k = sampling.top_k
            config.rng_seed = seed
        return config

    def reset(self) -> None:
        """See :meth:`charter.engine.base.Engine.reset`; the cache of prompt prefixes goes with the pipeline."""
        self._pipeline = None

    def _generator(self) -> Any:
        """The batching pipeline; prompts that begin like an earlier one reuse its keys and values."""
        if self._pipeline is None:
            scheduler = genai.SchedulerConfig()
            scheduler.max_num_batched_tokens = 4096
            scheduler.max_num_seqs = 64
            scheduler.enable_prefix_caching = True
            try:
                self._pipeline = genai.ContinuousBatchingPipeline(str(self._export), scheduler, "CPU", {})
            except RuntimeError as error:
                raise ModelError(
                    f"{self._export} cannot be loaded by OpenVINO.", fix="Delete it and try again."
                ) from error
        return self._pipeline

    def choose(self, prompts: Sequence[Conversation], options: Sequence[str]) -> list[list[float]]:
        """See :meth:`charter.engine.base.Engine.choose`."""
        tails = [self._continuation(option) for option in options]
        if len(set(options)) != len(options) or not options:
            raise EngineError("The options must be there and differ.")
        if any(len(tail) > 1 for tail in tails):
            pairs = [(prompt, option) for prompt in prompts for option in options]
            scores = self.loglikelihood([prompt for prompt, _ in pairs], [option for _, option in pairs])
            logprobs = np.array([score.logprob for score in scores]).reshape(len(prompts), len(options))
            return _softmax(logprobs)
        ids = [tail[0] for tail in tails]

        def work(rows: Sequence[int], logits: np.ndarray) -> list[list[float]]:
            return _softmax(logits[: len(rows), -1][:, ids].astype(np.float64))

        return self._scored(self._encode(prompts, 1), 1, work)

    def loglikelihood(self, prompts: Sequence[Conversation], continuations: Sequence[str]) -> list[Likelihood]:
        """See :meth:`charter.engine.base.LikelihoodEngine.loglikelihood`."""
        tails = [self._continuation(text) for text in continuations]
        longest = max((len(tail) for tail in tails), default=1)
        heads = self._encode(prompts, longest)

        def work(rows: Sequence[int], logits: np.ndarray) -> list[Likelihood]:
            found = []
            for index, row in enumerate(rows):
                tail = tails[row]
                scores = logits[index, -len(tail) - 1 : -1].astype(np.float64)
                peak = scores.max(-1)
                norm = peak + np.log(np.exp(scores - peak[:, None]).sum(-1))
                found.append(Likelihood(float((scores[np.arange(len(tail)), tail] - norm).sum()), len(tail)))
            return found

        joined = [head + tail for head, tail in zip(heads, tails, strict=True)]
        return self._scored(joined, longest + 1, work)

    def _scored(
        self, rows: Sequence[list[int]], keep: int, work: Callable[[Sequence[int], np.ndarray], list[T]]
    ) -> list[T]:
        """Run ``work`` on the logits of the last ``keep`` positions of left-padded, length-sorted batches."""
        request: Any = self._scoring_request() if rows else None
        results: dict[int, T] = {}
        for batch in batches([len(row) for row in rows], SCORE_TOKENS):
            longest = max(len(rows[row]) for row in batch)
            ids = np.zeros((len(batch), longest), dtype=np.int64)
            mask = np.zeros_like(ids)
            for index, row in enumerate(batch):
                ids[index, longest - len(rows[row]) :] = rows[row]
                mask[index, longest - len(rows[row]) :] = 1
            request.reset_state()
            output = request.infer(
                {
                    "input_ids": ids,
                    "attention_mask": mask,
                    "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
                    "beam_idx": np.arange(len(batch), dtype=np.int32),
                    "keep": np.array([-keep], dtype=np.int64),
                }
            )
            results.update(zip(batch, work(batch, output["logits"]), strict=True))
        return [results[row] for row in range(len(rows))]

    def _scoring_request(self) -> Any:
        """The same weights compiled once more, with logits of the last positions only."""
        if self._scorer is None:
            core = ov.Core()
            model = core.read_model(str(self._export / "openvino_model.xml"))
            keep = opset13.parameter(ov.PartialShape([1]), ov.Type.i64)
            keep.set_friendly_name("keep")
            keep.output(0).set_names({"keep"})
            head = model.output("logits").get_node().input_value(0).get_node()
            axis, step = (opset13.constant(np.array([value], dtype=np.int64)) for value in (1, 1))
            end = opset13.constant(np.array([np.iinfo(np.int64).max], dtype=np.int64))
            last = opset13.slice(head.input_value(0), keep, end, step, axis)
            head.input(0).replace_source_output(last.output(0))
            model.add_parameters([keep])
            model.validate_nodes_and_infer_types()
            self._scorer = core.compile_model(model, "CPU").create_infer_request()
        return self._scorer

    def _continuation(self, text: str) -> list[int]:
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise EngineError("An option or continuation has no tokens.", fix="Give it a text.")
        return tokens

    def _encode(self, conversations: Sequence[Conversation], room: int) -> list[list[int]]:
        return templates.encode_all(self.tokenizer, conversations, room=room, context=self.context)


@dataclass(frozen=True, slots=True)
class Quality:
    """What INT8 costs: mean log-probability, in nats a token, of the reference's own continuations."""

    reference: float
    quantised: float
    tokens: int
    rows: int

    @property
    def difference(self) -> float:
        """Quantised less reference; below zero where INT8 likes the text less."""
        return self.quantised - self.reference

    def to_dict(self) -> dict[str, float]:
        """As the report wants it."""
        return {**asdict(self), "difference": self.difference}


def measure_quality(
    reference: LikelihoodEngine, quantised: LikelihoodEngine, prompts: Sequence[Conversation], sampling: Sampling
) -> Quality:
    """Let the reference engine write, and score what it wrote under both engines."""
    written = reference.generate(prompts, sampling, seeds=range(len(prompts)))
    rows = [(prompt, item.text) for prompt, item in zip(prompts, written, strict=True) if item.text]
    asked, texts = [prompt for prompt, _ in rows], [text for _, text in rows]
    ours, theirs = (engine.loglikelihood(asked, texts) for engine in (reference, quantised))
    tokens = sum(item.tokens for item in ours)
    return Quality(
        reference=sum(item.logprob for item in ours) / max(tokens, 1),
        quantised=sum(item.logprob for item in theirs) / max(tokens, 1),
        tokens=tokens,
        rows=len(rows),
    )


def _softmax(values: np.ndarray) -> list[list[float]]:
    weights = np.exp(values - values.max(-1, keepdims=True))
    probabilities: list[list[float]] = (weights / weights.sum(-1, keepdims=True)).tolist()
    return probabilities


def _end_tokens(source: Path, config: dict[str, Any], tokenizer: Any) -> set[int]:
    ends = {tokenizer.eos_token_id}
    generation = source / "generation_config.json"
    for found in (config, json.loads(generation.read_text("utf-8")) if generation.exists() else {}):
        value = found.get("eos_token_id")
        ends.update(value if isinstance(value, list) else [value])
    return {token for token in ends if token is not None and token >= 0}
