"""The engine that is always there: Transformers, on a GPU or a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from charter.data import Conversation
from charter.engine import templates
from charter.engine.base import Completion, Likelihood, Progress, Sampling, batches, combine_digests
from charter.engine.models import digest_folder
from charter.errors import EngineError, ModelError

Precision = Literal["auto", "bf16", "fp32"]
T = TypeVar("T")


def pick_device(device: str = "auto") -> torch.device:
    """``cuda`` or ``mps`` where there is one, else ``cpu``; any other name is taken as it is."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """``bf16`` where the device computes in it natively, else ``fp32``."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return set()
    return {flag for line in lines[:64] if line.startswith("flags") for flag in line.split()}


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, with a padding token (one that is always masked) where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} has no tokenizer that can be loaded.", fix="Save one beside the model.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "left"
    return tokenizer


class TransformersEngine:
    """A causal language model in this process; see :class:`charter.engine.base.LikelihoodEngine`.

    Args:
        path: model folder with safetensors.
        precision: ``auto`` takes bf16 where the device has it.
        device: ``auto`` takes a GPU where there is one.
        batch_tokens: upper bound on rows x (prompt + new tokens) of a batch; halved when memory runs out.

    Raises:
        ModelError: a folder that cannot be loaded.
    """

    def __init__(
        self, path: Path, *, precision: Precision = "auto", device: str = "auto", batch_tokens: int = 16_384
    ) -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(precision, self.device)
        self.tokenizer = load_tokenizer(path)
        digest = digest_folder(path)
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=self.dtype, use_safetensors=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{path} cannot be loaded as a causal language model.", fix="Check the folder.") from error
        self.model: Any = model.eval().to(self.device)
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
        self.batch_tokens = batch_tokens
        precision_name = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        self.name = f"transformers {precision_name} on {self.device.type}"
        self.digest = combine_digests("transformers", torch.__version__, precision_name, self.device.type, digest)

    def reset(self) -> None:
        """Nothing to forget: no cache outlives a call."""

    def close(self) -> None:
        """Free the weights."""
        self.model = None

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
        sizes = [len(prompt) + sampling.max_new_tokens for prompt in prompts]
        stops = (*sampling.stop, *templates.stops(self.tokenizer))

        def work(rows: Sequence[int]) -> list[Completion]:
            done = self._generate([prompts[row] for row in rows], sampling, [seeds[row] for row in rows], stops)
            if progress:
                progress(len(rows))
            return done

        return self._batched(sizes, work)

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int], stops: tuple[str, ...]
    ) -> list[Completion]:
        inputs, mask = self._pad(prompts)
        ends = self._ends()
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(ends) or None,
            stop_strings=list(stops) or None,
        )
        output = self.model.generate(
            input_ids=inputs,
            attention_mask=mask,
            generation_config=config,
            logits_processor=_processors(sampling, seeds, inputs.shape[1]),
            tokenizer=self.tokenizer if stops else None,
        )
        new = output[:, inputs.shape[1] :].tolist()
        return [self._completion(tokens, len(prompt), ends, stops) for tokens, prompt in zip(new, prompts, strict=True)]

    def _completion(self, tokens: list[int], prompt: int, ends: set[int], stops: tuple[str, ...]) -> Completion:
        end = next((index for index, token in enumerate(tokens) if token in ends), None)
        used = tokens if end is None else tokens[:end]
        text = self.tokenizer.decode(used, skip_special_tokens=True)
        cut = min((position for stop in stops if (position := text.find(stop)) >= 0), default=None)
        stopped = end is not None or cut is not None
        count = len(used) + (end is not None)
        return Completion(text[:cut].strip(), "stop" if stopped else "length", prompt, count)

    def _ends(self) -> set[int]:
        """Token ids that end an answer, of the model and of the tokenizer."""
        given = self.model.generation_config.eos_token_id
        ends = set(given) if isinstance(given, list) else {given}
        return {token for token in (*ends, self.tokenizer.eos_token_id) if token is not None and token >= 0}

    def choose(self, prompts: Sequence[Conversation], options: Sequence[str]) -> list[list[float]]:
        """See :meth:`charter.engine.base.Engine.choose`."""
        if not options or len(set(options)) != len(options):
            raise EngineError("The options must be there and differ.")
        tokens = [self._continuation(option) for option in options]
        if any(len(item) > 1 for item in tokens):
            return self._choose_long(prompts, options)
        encoded = self._encode(prompts, 1)
        ids = torch.tensor([item[0] for item in tokens], device=self.device)

        @torch.inference_mode()
        def work(rows: Sequence[int]) -> list[list[float]]:
            inputs, mask = self._pad([encoded[row] for row in rows])
            logits = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=_positions(mask),
                logits_to_keep=1,
                use_cache=False,
            ).logits[:, -1]
            chosen: list[list[float]] = logits.float()[:, ids].softmax(-1).tolist()
            return chosen

        return self._batched([len(item) for item in encoded], work)

    def _choose_long(self, prompts: Sequence[Conversation], options: Sequence[str]) -> list[list[float]]:
        pairs = [(prompt, option) for prompt in prompts for option in options]
        scores = self.loglikelihood([prompt for prompt, _ in pairs], [option for _, option in pairs])
        logprobs = torch.tensor([score.logprob for score in scores], dtype=torch.float64)
        chosen: list[list[float]] = logprobs.view(len(prompts), len(options)).softmax(-1).tolist()
        return chosen

    def loglikelihood(self, prompts: Sequence[Conversation], continuations: Sequence[str]) -> list[Likelihood]:
        """See :meth:`charter.engine.base.LikelihoodEngine.loglikelihood`."""
        tails = [self._continuation(text) for text in continuations]
        heads = self._encode(prompts, max((len(tail) for tail in tails), default=1))

        @torch.inference_mode()
        def work(rows: Sequence[int]) -> list[Likelihood]:
            inputs, mask = self._pad([heads[row] + tails[row] for row in rows])
            keep = max(len(tails[row]) for row in rows)
            logits = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=_positions(mask),
                logits_to_keep=keep + 1,
                use_cache=False,
            ).logits[:, :-1]
            targets = inputs[:, -keep:]
            logprobs = logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            return [
                Likelihood(float(logprobs[index, -len(tails[row]) :].double().sum()), len(tails[row]))
                for index, row in enumerate(rows)
            ]

        return self._batched([len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)], work)

    def _continuation(self, text: str) -> list[int]:
        tokens = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if not tokens:
            raise EngineError("An option or continuation has no tokens.", fix="Give it a text.")
        return tokens

    def _encode(self, conversations: Sequence[Conversation], room: int) -> list[list[int]]:
        return templates.encode_all(self.tokenizer, conversations, room=room, context=self.context)

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Left-padded ids and mask, both of shape (rows, longest)."""
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(mask, device=self.device)

    def _batched(self, sizes: Sequence[int], work: Callable[[Sequence[int]], list[T]]) -> list[T]:
        """Run ``work`` over length-sorted batches of row numbers; results come back in the rows' order."""
        results: dict[int, T] = {}
        pending = list(batches(sizes, self.batch_tokens))
        while pending:
            rows = pending.pop(0)
            try:
                results.update(zip(rows, work(rows), strict=True))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if len(rows) == 1:
                    raise EngineError(
                        f"Memory ran out on a single row of {sizes[rows[0]]} tokens.", fix="Lower max_new_tokens."
                    ) from error
                half = len(rows) // 2
                pending[:0] = [rows[:half], rows[half:]]
        return [results[row] for row in range(len(sizes))]


class _RowSampler(LogitsProcessor):  # type: ignore[misc]  # transformers is not followed by mypy
    """Draws each row's token by inverse transform from the row's own stream of uniform numbers.

    All but the drawn token are masked, so that greedy decoding picks it: what a row becomes depends on its logits and
    its seed alone, whatever rows stand beside it.
    """

    def __init__(self, seeds: Sequence[int], prompt_length: int, steps: int) -> None:
        streams = [
            torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
        ]
        self._uniform = torch.stack(streams)
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = self._uniform[:, input_ids.shape[1] - self._prompt_length].to(scores.device).unsqueeze(-1)
        cumulative = scores.float().softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cumulative, (uniform * cumulative[:, -1:]).float())
        drawn = drawn.clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def _processors(sampling: Sampling, seeds: Sequence[int], prompt_length: int) -> LogitsProcessorList:
    processors: list[Any] = []
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_RowSampler(seeds, prompt_length, sampling.max_new_tokens))
    return LogitsProcessorList(processors)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text
