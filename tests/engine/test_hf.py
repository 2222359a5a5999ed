from __future__ import annotations

from pathlib import Path

import pytest
import torch

from charter.data import Conversation
from charter.engine import LikelihoodEngine, Sampling
from charter.engine.hf import TransformersEngine
from charter.errors import EngineError, ModelError

PROMPTS = [
    Conversation.user(text) for text in ("Hi.", "Name three colours of the rainbow, please.", "What is two plus two?")
]
SAMPLING = Sampling(max_new_tokens=12, temperature=1.0)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> TransformersEngine:
    return TransformersEngine(tiny_model, precision="fp32", device="cpu")


def test_keeps_the_interface(engine: TransformersEngine) -> None:
    assert isinstance(engine, LikelihoodEngine)


def test_row_depends_on_its_seed_and_not_on_its_neighbours(engine: TransformersEngine) -> None:
    together = engine.generate(PROMPTS, SAMPLING, seeds=[1, 2, 3])
    alone = [
        engine.generate([prompt], SAMPLING, seeds=[seed])[0] for prompt, seed in zip(PROMPTS, [1, 2, 3], strict=True)
    ]
    assert [item.text for item in together] == [item.text for item in alone]
    other = engine.generate(PROMPTS, SAMPLING, seeds=[4, 2, 3])
    assert other[0].text != together[0].text
    assert other[1:] == together[1:]


def test_sampling_follows_the_model(engine: TransformersEngine) -> None:
    prompt, draws = PROMPTS[0], 600
    sampling = Sampling(max_new_tokens=1, temperature=1.0, top_k=2)
    texts = [item.text for item in engine.generate([prompt] * draws, sampling, seeds=range(draws))]
    inputs, _ = engine._pad(engine._encode([prompt], 1))
    with torch.inference_mode():
        top = engine.model(input_ids=inputs).logits[0, -1].float().topk(2)
    expected = float(top.values.softmax(-1)[0])
    first = engine.tokenizer.decode([int(top.indices[0])]).strip()
    assert sum(text == first for text in texts) / draws == pytest.approx(expected, abs=0.07)


def test_zero_temperature_is_greedy(engine: TransformersEngine) -> None:
    greedy = Sampling(max_new_tokens=8, temperature=0)
    assert engine.generate(PROMPTS, greedy, seeds=[1, 2, 3]) == engine.generate(PROMPTS, greedy, seeds=[7, 8, 9])


def test_stop_string_is_not_part_of_the_text(engine: TransformersEngine) -> None:
    whole = engine.generate(PROMPTS[:1], SAMPLING, seeds=[1])[0].text
    stop = whole[4:7]
    cut = engine.generate(PROMPTS[:1], Sampling(max_new_tokens=12, temperature=1.0, stop=(stop,)), seeds=[1])[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)].strip()


def test_choose_is_a_softmax_over_the_options(engine: TransformersEngine) -> None:
    prompts = [prompt.add("assistant", "The answer is: (") for prompt in PROMPTS]
    probabilities = engine.choose(prompts, ["A", "B"])
    for row, prompt in zip(probabilities, prompts, strict=True):
        inputs, _ = engine._pad(engine._encode([prompt], 1))
        with torch.inference_mode():
            logits = engine.model(input_ids=inputs).logits[0, -1].float()
        ids = [engine.tokenizer.encode(option, add_special_tokens=False)[0] for option in "AB"]
        assert row == pytest.approx(logits[ids].softmax(-1).tolist(), abs=1e-5)


def test_choose_among_long_options_uses_their_likelihood(engine: TransformersEngine) -> None:
    options = ["yes, I would", "no"]
    row = engine.choose(PROMPTS[:1], options)[0]
    scores = engine.loglikelihood(PROMPTS[:1] * 2, options)
    expected = torch.tensor([score.logprob for score in scores]).softmax(-1).tolist()
    assert row == pytest.approx(expected, abs=1e-6)


def test_loglikelihood_equals_the_models_own_loss(engine: TransformersEngine) -> None:
    texts = ["Hello there.", "Red, orange and yellow are three of them.", "Four"]
    for prompt, text, found in zip(PROMPTS, texts, engine.loglikelihood(PROMPTS, texts), strict=True):
        head, tail = engine._encode([prompt], 1)[0], engine._continuation(text)
        labels = torch.tensor([[-100] * len(head) + tail])
        with torch.inference_mode():
            loss = engine.model(input_ids=torch.tensor([head + tail]), labels=labels).loss
        assert found.mean == pytest.approx(-float(loss), abs=1e-4)
        assert found.tokens == len(tail)


def test_batches_shrink_when_memory_runs_out(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(PROMPTS, SAMPLING, seeds=[1, 2, 3])
    original, sizes = TransformersEngine._generate, []

    def scarce(self: TransformersEngine, prompts: list[list[int]], *rest: object) -> object:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError
        return original(self, prompts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TransformersEngine, "_generate", scarce)
    assert engine.generate(PROMPTS, SAMPLING, seeds=[1, 2, 3]) == expected
    assert max(sizes) == 3


def test_prompt_beyond_the_context_is_named(engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match="Row 1 needs"):
        engine.generate([PROMPTS[0], Conversation.user("word " * 2000)], SAMPLING, seeds=[1, 2])


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        TransformersEngine(tmp_path)


def test_base_model_without_template_or_pad_token(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    folder = tmp_path / "base"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").unlink()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    base = TransformersEngine(folder, precision="fp32", device="cpu")
    together = base.generate(PROMPTS, SAMPLING, seeds=[1, 2, 3])
    assert together[0] == base.generate(PROMPTS[:1], SAMPLING, seeds=[1])[0]
