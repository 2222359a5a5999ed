"""The fast engine on a CPU: OpenVINO GenAI's continuous batching over an INT8 export of the policy."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

SCORE_TOKENS = 8_192
"""Rows x tokens of one scoring batch at most."""

SCORE_LOGITS = 2**26
"""Logits of one scoring batch at most (rows x scored positions x vocabulary; 256 MiB), unless one row needs more."""

SCORING = {"INFERENCE_PRECISION_HINT": "f32"}
"""Scoring computes in float32: logits near 20 rounded to bf16 lie 0.125 apart, too coarse for soft labels.

Activations are still quantised on the fly; ``DYNAMIC_QUANTIZATION_GROUP_SIZE`` of 0 ends that, halves the error of
:meth:`OpenVINOEngine.choose`, makes a score independent of its batch, and takes almost twice the time.
"""


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
        # What the runtime computes in depends on the processor: bf16 where it has it.
        precision = "bf16" if "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "fp32"
        self.digest = combine_digests(
            "openvino", ov.__version__, genai.__version__, "int8", precision, export.name, digest_folder(source)
        )
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
        if len(seeds) != len(prompts):
            raise ValueError("There must be one seed a row.")
        stops = (*sampling.stop, *templates.stops(self.tokenizer))
        try:
            written = self._write(prompts, [self._config(sampling, seed) for seed in seeds], stops, progress)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed to generate: {str(error).splitlines()[0]}.") from error
        return [self._completion(new, len(prompt), stops) for new, prompt in zip(written, prompts, strict=True)]

    def _write(
        self, prompts: Sequence[list[int]], configs: Sequence[Any], stops: tuple[str, ...], progress: Progress | None
    ) -> list[list[int]]:
        """The tokens that follow each prompt; a row leaves the batch as soon as it holds a stop string."""
        pipeline = self._generator()
        written: list[list[int]] = [[] for _ in prompts]
        live: dict[int, Any] = {}
        try:
            for row, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
                live[row] = pipeline.add_request(row, ov.Tensor(np.array([prompt], dtype=np.int64)), config)
            while live:
                pipeline.step()
                before = len(live)
                for row in list(live):
                    if self._advance(live[row], written[row], stops):
                        del live[row]
                if progress and len(live) < before:
                    progress(before - len(live))
            if pipeline.has_non_finished_requests():
                pipeline.step()  # lets go of the rows that were stopped
        except BaseException:
            self._pipeline = None  # whatever is still under way must not meet the next call
            with contextlib.suppress(RuntimeError):
                for handle in live.values():
                    handle.cancel()
                pipeline.step()
            raise
        return written

    def _advance(self, handle: Any, tokens: list[int], stops: tuple[str, ...]) -> bool:
        """Take the tokens that a row has gained; whether the row is done."""
        status = handle.get_status()  # read first: what is final now has all its tokens
        gained = 0
        while handle.can_read():
            for output in handle.read().values():
                tokens.extend(output.generated_ids)
                gained += len(output.generated_ids)
        if status == genai.GenerationStatus.IGNORED:
            raise EngineError("OpenVINO had no memory for a row.", fix="Lower max_new_tokens or shorten the prompt.")
        if status != genai.GenerationStatus.RUNNING:
            return True
        if gained and stops:
            recent = self.tokenizer.decode(tokens[-gained - 4 - max(map(len, stops)) :])
            if any(stop in recent for stop in stops):
                handle.stop()
                return True
        return False

    def _completion(self, tokens: list[int], prompt: int, stops: tuple[str, ...]) -> Completion:
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
                raise self._broken() from error
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
            return [_softmax(row) for row in logprobs]
        ids = [tail[0] for tail in tails]
        encoded = self._encode(prompts, 1)
        return [_softmax(scores[-1]) for scores in self._scored(encoded, [[ids]] * len(encoded))]

    def loglikelihood(self, prompts: Sequence[Conversation], continuations: Sequence[str]) -> list[Likelihood]:
        """See :meth:`charter.engine.base.LikelihoodEngine.loglikelihood`."""
        tails = [self._continuation(text) for text in continuations]
        heads = self._encode(prompts, max((len(tail) for tail in tails), default=1))
        rows = [head + tail[:-1] for head, tail in zip(heads, tails, strict=True)]
        scores = self._scored(rows, [[[token] for token in tail] for tail in tails])
        return [Likelihood(float(found.sum()), len(found)) for found in scores]

    def _scored(self, rows: Sequence[list[int]], asked: Sequence[Sequence[Sequence[int]]]) -> list[np.ndarray]:
        """Log-probabilities after the last positions of each row.

        Args:
            rows: token ids.
            asked: of each row, tokens to score after each of its last positions: (positions, tokens).

        Returns:
            Of each row, an array of shape (positions, tokens), float64.
        """
        request: Any = self._scoring_request() if rows else None
        found: dict[int, np.ndarray] = {}
        for batch in self._score_batches([len(row) for row in rows], [len(item) for item in asked]):
            longest = max(len(rows[row]) for row in batch)
            keep = max(len(asked[row]) for row in batch)
            ids = np.zeros((len(batch), longest), dtype=np.int64)
            mask = np.zeros_like(ids)
            targets = np.zeros((len(batch), keep, len(asked[batch[0]][0])), dtype=np.int64)
            for index, row in enumerate(batch):
                ids[index, longest - len(rows[row]) :] = rows[row]
                mask[index, longest - len(rows[row]) :] = 1
                targets[index, keep - len(asked[row]) :] = asked[row]
            request.reset_state()
            output = request.infer(
                {
                    "input_ids": ids,
                    "attention_mask": mask,
                    "position_ids": np.maximum(mask.cumsum(1) - 1, 0),
                    "beam_idx": np.arange(len(batch), dtype=np.int32),
                    "keep": np.array([-keep], dtype=np.int64),
                    "targets": targets,
                }
            )[0]
            for index, row in enumerate(batch):
                found[row] = output[index, keep - len(asked[row]) :].astype(np.float64)
        return [found[row] for row in range(len(rows))]

    def _score_batches(self, sizes: Sequence[int], positions: Sequence[int]) -> Iterator[list[int]]:
        """Length-sorted batches whose logits stay within :data:`SCORE_LOGITS`."""
        for batch in batches(sizes, SCORE_TOKENS):
            most = max(positions[row] for row in batch) * len(self.tokenizer)
            rows = max(SCORE_LOGITS // most, 1)
            yield from (batch[start : start + rows] for start in range(0, len(batch), rows))

    def _scoring_request(self) -> Any:
        """The same weights compiled once more: log-probabilities of given tokens after the last positions."""
        if self._scorer is None:
            core = ov.Core()
            try:
                model = core.read_model(str(self._export / "openvino_model.xml"))
            except RuntimeError as error:
                raise self._broken() from error
            keep, targets = _parameter("keep", [1]), _parameter("targets", [-1, -1, -1])
            result = model.output("logits").get_node()
            head = result.input_value(0).get_node()
            axis, step, end = (opset13.constant(np.array([value], dtype=np.int64)) for value in (1, 1, 2**62))
            last = opset13.slice(head.input_value(0), keep, end, step, axis)
            head.input(0).replace_source_output(last.output(0))
            head.validate_and_infer_types()
            scores = opset13.gather_elements(opset13.log_softmax(head.output(0), 2), targets, 2)
            result.input(0).replace_source_output(scores.output(0))
            model.add_parameters([keep, targets])
            model.validate_nodes_and_infer_types()
            self._scorer = core.compile_model(model, "CPU", SCORING).create_infer_request()
        return self._scorer

    def _broken(self) -> ModelError:
        return ModelError(f"{self._export} cannot be loaded by OpenVINO.", fix="Delete it and try again.")

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


def _parameter(name: str, sizes: list[int]) -> Any:
    parameter = opset13.parameter(ov.PartialShape(sizes), ov.Type.i64)
    parameter.set_friendly_name(name)
    parameter.output(0).set_names({name})
    return parameter


def _softmax(values: np.ndarray) -> list[float]:
    weights = np.exp(values - values.max())
    probabilities: list[float] = (weights / weights.sum()).tolist()
    return probabilities


def _end_tokens(source: Path, config: dict[str, Any], tokenizer: Any) -> set[int]:
    ends = {tokenizer.eos_token_id}
    generation = source / "generation_config.json"
    for found in (config, json.loads(generation.read_text("utf-8")) if generation.exists() else {}):
        value = found.get("eos_token_id")
        ends.update(value if isinstance(value, list) else [value])
    return {token for token in ends if token is not None and token >= 0}
