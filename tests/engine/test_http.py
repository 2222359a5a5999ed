"""The HTTP engine against real server processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from charter.data import Conversation
from charter.engine import Engine, EngineConfig, Sampling, load_engine
from charter.engine.hf import TransformersEngine
from charter.engine.http import HTTPEngine
from charter.errors import EngineError

SERVER = Path(__file__).parents[1] / "servers" / "chat_server.py"
PROMPTS = [Conversation.user(f"Tell me the number {number}.") for number in range(12)]
SAMPLING = Sampling(max_new_tokens=6, temperature=1.0)
SECRET = "a-phrase-that-no-error-may-hold"


@pytest.fixture(scope="session")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that adds no system turn, so that server and local engine read one text."""
    import shutil

    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def process(chat_model: Path) -> Iterator[str]:
    """The address of a server process that lives as long as this module's tests."""
    with subprocess.Popen([sys.executable, str(SERVER), str(chat_model)], stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            port = running.stdout.readline().strip()
            assert port, "the server did not start"
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            running.kill()


@pytest.fixture
def server(process: str) -> str:
    """The address of the server, well behaved."""
    behave(process)
    return process


def behave(url: str, **settings: object) -> None:
    """Set how the server misbehaves from now on, and start its counts again."""
    data = json.dumps(settings).encode()
    urllib.request.urlopen(urllib.request.Request(url, data=data, method="PUT")).close()


@pytest.fixture
def connect() -> Iterator[Callable[..., HTTPEngine]]:
    engines: list[HTTPEngine] = []

    def make(url: str, model: str = "tiny", **settings: object) -> HTTPEngine:
        engines.append(HTTPEngine(url, model, **settings))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def statistics(url: str) -> dict:
    with urllib.request.urlopen(url) as stream:
        return json.loads(stream.read())


def test_keeps_the_interface(server: str) -> None:
    engine = load_engine(EngineConfig(base_url=server, model="tiny"), Path("unused"))
    assert isinstance(engine, HTTPEngine)
    assert isinstance(engine, Engine)
    engine.close()


def test_order_and_seeds(server: str, connect: Callable[..., HTTPEngine]) -> None:
    engine = connect(server)
    done: list[int] = []
    seeds = list(range(len(PROMPTS)))
    first = engine.generate(PROMPTS, SAMPLING, seeds=seeds, progress=done.append)
    assert sum(done) == len(PROMPTS)
    alone = [engine.generate([PROMPTS[row]], SAMPLING, seeds=[row])[0] for row in (0, 5, 11)]
    assert [first[row] for row in (0, 5, 11)] == alone
    assert len({item.text for item in first}) > 6
    assert engine.generate(PROMPTS[:1], SAMPLING, seeds=[99])[0].text != first[0].text
    assert all(item.completion_tokens <= 6 and item.prompt_tokens > 5 for item in first)
    assert first[0].finish_reason == ("stop" if first[0].completion_tokens < 6 else "length")


def test_greedy_text_and_choices_equal_the_local_engine(
    server: str, chat_model: Path, connect: Callable[..., HTTPEngine]
) -> None:
    remote, local = connect(server), TransformersEngine(chat_model, precision="fp32", device="cpu")
    greedy = Sampling(max_new_tokens=6, temperature=0)
    prompts = [PROMPTS[0], PROMPTS[1].add("assistant", "The number is")]
    assert [item.text for item in remote.generate(prompts, greedy, seeds=[1, 2])] == [
        item.text for item in local.generate(prompts, greedy, seeds=[1, 2])
    ]
    # Options that the model itself holds likely, so that they stand among the alternatives.
    asked = [prompt.add("assistant", "The answer is: (") for prompt in PROMPTS[:3]]
    for conversation in asked:
        words = _likely_words(local, conversation)
        assert remote.choose([conversation], words)[0] == pytest.approx(
            local.choose([conversation], words)[0], rel=1e-3
        )


def _likely_words(engine: TransformersEngine, conversation: Conversation) -> list[str]:
    """Two single-token words among the likeliest tokens, of which neither begins the other nor a third listed one."""
    import torch

    inputs, _ = engine._pad(engine._encode([conversation], 1))
    with torch.inference_mode():
        top = engine.model(input_ids=inputs).logits[0, -1].topk(20).indices.tolist()
    texts = [engine.tokenizer.decode([token]) for token in top]
    stripped = [text.strip() for text in texts]

    def clear(position: int) -> bool:
        text = texts[position]
        others = [word for index, word in enumerate(stripped) if index != position and word]
        clash = any(word.startswith(text) or text.startswith(word) for word in others)
        return text.isalpha() and text.isascii() and not clash

    words = [texts[position] for position in range(20) if clear(position)]
    words = [word for word in words if len(engine._continuation(word)) == 1]
    assert len(words) >= 2
    return words[:2]


def test_a_continued_turn_that_comes_back_whole_is_cut(server: str, connect: Callable[..., HTTPEngine]) -> None:
    prompts = [PROMPTS[1].add("assistant", "The number is")]
    part = connect(server).generate(prompts, SAMPLING, seeds=[1])
    behave(server, whole=True)
    assert connect(server).generate(prompts, SAMPLING, seeds=[1]) == part


def test_choose_with_an_unlisted_option_is_an_error(server: str, connect: Callable[..., HTTPEngine]) -> None:
    with pytest.raises(EngineError, match="no option is among"):
        connect(server).choose(PROMPTS[:1], ["\N{SNOWMAN}1", "\N{COMET}2"])


def test_options_that_one_token_cannot_tell_apart(server: str, connect: Callable[..., HTTPEngine]) -> None:
    with pytest.raises(EngineError, match="begins another"):
        connect(server).choose(PROMPTS[:1], ["A", "AB"])


def test_concurrency_is_bounded_and_key_is_sent(server: str, connect: Callable[..., HTTPEngine]) -> None:
    behave(server, delay=0.1)
    connect(server, api_key="key", concurrency=3).generate(
        PROMPTS, Sampling(max_new_tokens=1, top_k=5), seeds=range(12)
    )
    seen = statistics(server)
    assert seen["peak"] == 3
    assert seen["requests"] == 12
    assert seen["authorization"] == "Bearer key"
    assert seen["last"]["top_k"] == 5
    assert "repetition_penalty" not in seen["last"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("charter.engine.http.FIRST_DELAY", 0.01)


@pytest.mark.usefixtures("quick")
def test_retries_until_the_server_works(server: str, connect: Callable[..., HTTPEngine]) -> None:
    behave(server, fail=2)
    assert connect(server).generate(PROMPTS[:1], SAMPLING, seeds=[1])[0].prompt_tokens > 5
    assert statistics(server)["requests"] == 3


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("status", "requests"), [(503, 3), (400, 1)])
def test_gives_up(status: int, requests: int, server: str, connect: Callable[..., HTTPEngine]) -> None:
    behave(server, fail=99, status=status)
    with pytest.raises(EngineError, match=f"status {status}") as caught:
        connect(server, retries=2).generate([Conversation.user(SECRET)], SAMPLING, seeds=[1])
    assert SECRET not in str(caught.value)
    assert statistics(server)["requests"] == requests


def test_choose_without_logprobs_is_an_error(server: str, connect: Callable[..., HTTPEngine]) -> None:
    behave(server, logprobs=False)
    with pytest.raises(EngineError, match="no log-probabilities"):
        connect(server).choose(PROMPTS[:1], ["A", "B"])


def test_unknown_model_names_the_fix(server: str, connect: Callable[..., HTTPEngine]) -> None:
    with pytest.raises(EngineError, match="the model's name"):
        connect(server, model="other").generate(PROMPTS, SAMPLING, seeds=range(12))


def test_slow_server_times_out(server: str, connect: Callable[..., HTTPEngine]) -> None:
    behave(server, delay=1)
    with pytest.raises(EngineError, match="did not answer within"):
        connect(server, timeout=0.2, retries=0).generate(PROMPTS[:1], SAMPLING, seeds=[1])


def test_dead_port_is_reported_quickly(connect: Callable[..., HTTPEngine]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    engine = connect(f"http://name:{SECRET}@127.0.0.1:{port}/v1", retries=8)
    began = time.perf_counter()
    with pytest.raises(EngineError, match="no connection") as caught:
        engine.generate([Conversation.user("A question.")] * 40, SAMPLING, seeds=range(40))
    assert time.perf_counter() - began < 5
    assert SECRET not in str(caught.value) + engine.name
    assert caught.value.fix


def test_works_inside_a_running_event_loop(server: str, connect: Callable[..., HTTPEngine]) -> None:
    import asyncio

    async def notebook() -> int:
        return len(connect(server).generate(PROMPTS[:2], SAMPLING, seeds=[1, 2]))

    assert asyncio.run(notebook()) == 2


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", ""])
def test_address_that_is_none(url: str) -> None:
    with pytest.raises(EngineError, match="not an HTTP address"):
        HTTPEngine(url, "tiny")
