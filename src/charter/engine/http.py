"""An engine behind an OpenAI-compatible server: vLLM, SGLang, the llama.cpp server, or a provider.

Requests go out through the official ``openai`` client, at most ``concurrency`` at a time, from an event loop in a
thread of its own, so that callers stay synchronous and connections are kept between calls.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib.util
import math
import random
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from charter.data import Conversation
from charter.engine.base import Completion, Progress, Sampling, combine_digests
from charter.errors import EngineError, MissingExtraError

T = TypeVar("T")
R = TypeVar("R")
Prefill = Literal["continue", "message"]

TOP_LOGPROBS = 20
"""Alternatives asked for by :meth:`HTTPEngine.choose`: the most that the OpenAI API and vLLM's default allow."""

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""

FIXES = {
    400: "Check that the prompt fits the server's context and that it knows every parameter (docs/scale-out.md).",
    401: "Set the key in the environment variable that engine.api_key_env names.",
    403: "Set a key that may use this model.",
    404: "Check the base URL (it ends in /v1) and the model's name as the server lists it.",
    422: "Check that the server knows every parameter (docs/scale-out.md).",
    429: "Lower engine.concurrency.",
}


class HTTPEngine:
    """A model served over the OpenAI chat API.

    A conversation whose last turn is the assistant's is to be *continued*. Servers differ here: vLLM and SGLang need
    ``continue_final_message`` beside the messages, which is what ``prefill="continue"`` sends (the llama.cpp server
    takes it too); ``"message"`` sends the messages alone, for servers that continue a last assistant turn by
    themselves. OpenAI's own API does neither. A turn that comes back whole is cut to its new part.

    The digest covers the base URL and the model's name, since a server does not say which weights it holds: serve
    other weights under another name.

    Args:
        base_url: of the server, up to and including ``/v1``.
        model: name of the model as the server lists it.
        api_key: sent as a bearer token; servers without keys ignore it.
        concurrency: requests under way at once.
        timeout: seconds that a request may take.
        retries: further tries of a request after a timeout, a lost connection or a status that may pass (408, 409,
            425, 429, 5xx), with exponential back-off and full jitter, or the server's ``Retry-After``. A server that
            has never answered is tried once more only, so that a dead endpoint is reported in about a second.
        prefill: how a last assistant turn is continued.

    Raises:
        EngineError: an address that is not one, or settings out of range.
        MissingExtraError: without the ``openai`` package.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 4,
        *,
        prefill: Prefill = "continue",
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise EngineError("The server's base URL is not an HTTP address.", fix="Write http://host:8000/v1.")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise EngineError("concurrency must be at least 1, timeout above 0 and retries at least 0.")
        if importlib.util.find_spec("openai") is None:
            raise MissingExtraError("The HTTP engine needs the openai package.", fix="pip install 'charter[http]'")
        self.model = model
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.prefill: Prefill = prefill
        self._base_url = base_url
        self._api_key = api_key or "none"
        self._place = parts.hostname + (f":{parts.port}" if parts.port else "")
        self.name = f"{model} at {self._place}"
        self.digest = combine_digests("http", base_url.rstrip("/"), model, prefill)
        self._answered = False
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def generate(
        self,
        conversations: Sequence[Conversation],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        progress: Progress | None = None,
    ) -> list[Completion]:
        """See :meth:`charter.engine.base.Engine.generate`.

        ``top_k`` and ``repetition_penalty`` are not part of OpenAI's API and are sent only where they are set. A row's
        ``seed`` is passed on; whether it decides the text is up to the server. ``progress`` is called from the engine's
        own thread.
        """

        async def one(row: int) -> Completion:
            reply = await self._create(conversations[row], **_parameters(sampling), seed=seeds[row])
            if progress:
                progress(1)
            return _completion(reply, conversations[row], self._place)

        if len(seeds) != len(conversations):
            raise ValueError("There must be one seed a conversation.")
        return self._run(one, range(len(conversations)))

    def choose(self, prompts: Sequence[Conversation], options: Sequence[str]) -> list[list[float]]:
        """See :meth:`charter.engine.base.Engine.choose`.

        One token is asked for, with the log-probabilities of the 20 likeliest; an option has the mass of the tokens
        that begin it and no other option (white space before it is ignored). An option that is not among the 20
        counts with the least of the 20, an upper bound, where another option is listed.

        Raises:
            EngineError: options that share their beginning, a server that returns no log-probabilities, or a prompt
                after which no option is among the 20.
        """
        _check_options(options)

        async def one(row: int) -> list[float]:
            reply = await self._create(
                prompts[row], max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=TOP_LOGPROBS
            )
            return _probabilities(_alternatives(reply, self._place), options, row)

        return self._run(one, range(len(prompts)))

    def reset(self) -> None:
        """Nothing to forget here; the server's caches are its own."""

    def close(self) -> None:
        """Close the connections and end the thread."""
        loop, thread, client = self._loop, self._thread, self._client
        self._loop = self._thread = self._client = None
        if loop is None or thread is None:
            return
        if client is not None:
            asyncio.run_coroutine_threadsafe(client.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    # --- requests ---------------------------------------------------------------------------------------------------

    async def _create(self, conversation: Conversation, **parameters: Any) -> Any:
        import openai

        extra: dict[str, Any] = parameters.pop("extra_body", {})
        if self.prefill == "continue" and conversation.messages[-1].role == "assistant":
            extra = {**extra, "continue_final_message": True, "add_generation_prompt": False}
        if extra:
            parameters["extra_body"] = extra
        attempt = 0
        while True:
            try:
                reply = await self._client.chat.completions.create(
                    model=self.model, messages=conversation.to_list(), **parameters
                )
            except (openai.OpenAIError, ValueError) as error:
                delay = self._delay(error, attempt)
                attempt += 1
                await asyncio.sleep(delay)
            else:
                self._answered = True
                return reply

    def _delay(self, error: Exception, attempt: int) -> float:
        """Seconds to wait before the next try; raises where there is none."""
        import openai

        limit = self.retries
        asked = None
        if isinstance(error, openai.APIStatusError):
            self._answered = True
            failure = EngineError(
                f"The server at {self._place} answered with status {error.status_code}.",
                fix=FIXES.get(error.status_code, "Look into the server's log."),
            )
            if error.status_code not in RETRIED:
                raise failure from None
            asked = _retry_after(error.response.headers.get("retry-after"))
        elif isinstance(error, openai.APITimeoutError):
            failure = EngineError(
                f"The server at {self._place} did not answer within {self.timeout:g} s.", fix="Raise engine.timeout."
            )
        elif isinstance(error, openai.APIConnectionError):
            failure = EngineError(
                f"There is no connection to the server at {self._place}.",
                fix="Start the server, or correct engine.base_url.",
            )
            limit = limit if self._answered else min(limit, 1)
        else:
            raise EngineError(
                f"The server at {self._place} sent an answer that is not of the OpenAI chat API.",
                fix="Check that the base URL ends in /v1.",
            ) from None
        if attempt >= limit:
            raise failure from None
        ceiling = min(FIRST_DELAY * 2**attempt, LONGEST_DELAY)
        return asked if asked is not None else random.uniform(0, ceiling)  # noqa: S311 - jitter, not a secret

    def _run(self, work: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        """Results in the items' order; the first failure ends the rest."""
        if not items:
            return []
        loop = self._start()
        future = asyncio.run_coroutine_threadsafe(self._gather(work, items), loop)
        try:
            return future.result()
        except (KeyboardInterrupt, concurrent.futures.CancelledError):
            future.cancel()
            raise

    async def _gather(self, work: Callable[[T], Awaitable[R]], items: Sequence[T]) -> list[R]:
        results: dict[int, R] = {}
        pending = iter(enumerate(items))

        async def worker() -> None:
            for position, item in pending:
                results[position] = await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(items))):
                    group.create_task(worker())
        except BaseExceptionGroup as failures:
            raise _first(failures) from None
        return [results[position] for position in range(len(items))]

    def _start(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            import openai

            loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=loop.run_forever, name="charter-http", daemon=True)
            self._thread.start()
            self._loop = loop

            async def connect() -> Any:
                return openai.AsyncOpenAI(
                    base_url=self._base_url, api_key=self._api_key, timeout=self.timeout, max_retries=0
                )

            self._client = asyncio.run_coroutine_threadsafe(connect(), loop).result()
        return self._loop


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure


def _retry_after(header: str | None) -> float | None:
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return min(seconds, LONGEST_DELAY) if seconds >= 0 else None


def _parameters(sampling: Sampling) -> dict[str, Any]:
    parameters: dict[str, Any] = {"max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature}
    extra: dict[str, Any] = {}
    if sampling.top_p < 1:
        parameters["top_p"] = sampling.top_p
    if sampling.stop:
        parameters["stop"] = list(sampling.stop)
    if sampling.top_k:
        extra["top_k"] = sampling.top_k
    if sampling.repetition_penalty != 1:
        extra["repetition_penalty"] = sampling.repetition_penalty
    if extra:
        parameters["extra_body"] = extra
    return parameters


def _choice(reply: Any, place: str) -> Any:
    choices = getattr(reply, "choices", None)
    if not choices or getattr(choices[0], "message", None) is None:
        raise EngineError(
            f"The server at {place} sent an answer that is not of the OpenAI chat API.",
            fix="Check that the base URL ends in /v1.",
        )
    return choices[0]


def _completion(reply: Any, conversation: Conversation, place: str) -> Completion:
    choice = _choice(reply, place)
    usage = reply.usage
    text = choice.message.content or ""
    last = conversation.messages[-1]
    if last.role == "assistant" and last.content:
        text = text.removeprefix(last.content)  # the llama.cpp server sends the whole turn, others its new part
    return Completion(
        text.strip(),
        "length" if choice.finish_reason == "length" else "stop",
        usage.prompt_tokens if usage else 0,
        usage.completion_tokens if usage else 0,
    )


def _alternatives(reply: Any, place: str) -> list[tuple[str, float]]:
    """Token texts and log-probabilities (nats) of the first position."""
    logprobs = getattr(_choice(reply, place), "logprobs", None)
    content = logprobs.content if logprobs else None
    listed = content[0].top_logprobs if content else None
    if not listed:
        raise EngineError(
            f"The server at {place} returns no log-probabilities, which comparing answers needs.",
            fix="Use a server that supports logprobs and top_logprobs for chat completions.",
        )
    return [(item.token, item.logprob) for item in listed]


def _check_options(options: Sequence[str]) -> None:
    starts = [option.strip() for option in options]
    if not starts or not all(starts):
        raise EngineError("The options must be there and hold text.")
    for first, start in enumerate(starts):
        if any(other.startswith(start) for index, other in enumerate(starts) if index != first):
            raise EngineError("One option begins another; one token cannot tell them apart.", fix="Use A and B.")


def _probabilities(listed: Sequence[tuple[str, float]], options: Sequence[str], row: int) -> list[float]:
    mass = [0.0] * len(options)
    for token, logprob in listed:
        text = token.replace("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", " ").replace("\u2581", " ").strip()
        if not text:
            continue
        matches = [index for index, option in enumerate(options) if _begins(text, option.strip())]
        if len(matches) == 1:
            mass[matches[0]] += math.exp(logprob)
    if not any(mass):
        raise EngineError(
            f"After prompt {row} no option is among the server's {len(listed)} likeliest tokens.",
            fix="Check that the server continues a last assistant turn (docs/scale-out.md).",
        )
    bound = math.exp(min(logprob for _, logprob in listed))
    filled = [value or bound for value in mass]
    return [value / sum(filled) for value in filled]


def _begins(token: str, option: str) -> bool:
    """Whether the token is a beginning of the option, or the option and then something that is not a word."""
    return option.startswith(token) or (token.startswith(option) and not token[len(option)].isalnum())
