from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("openvino_genai")

from charter.data import Conversation
from charter.engine import Completion, LikelihoodEngine, Sampling
from charter.engine.export import export, supports
from charter.engine.hf import TransformersEngine
from charter.engine.openvino import OpenVINOEngine, measure_quality
from charter.errors import EngineError, ModelError

PROMPTS = [
    Conversation.user(text)
    for text in ("What's the capital of France?", "Name three colours.", "Write a short poem about rain.")
]


@pytest.fixture(scope="module")
def engine(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> OpenVINOEngine:
    return OpenVINOEngine(export(smollm, tmp_path_factory.mktemp("exports")), smollm)


def test_keeps_the_interface(engine: OpenVINOEngine) -> None:
    assert isinstance(engine, LikelihoodEngine)


def test_answers_a_plain_question(engine: OpenVINOEngine) -> None:
    answer = engine.generate(PROMPTS[:1], Sampling(max_new_tokens=24, temperature=0), seeds=[0])[0]
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_row_depends_on_its_seed_and_not_on_its_neighbours(engine: OpenVINOEngine) -> None:
    sampling = Sampling(max_new_tokens=16, temperature=1.0)

    def fresh(prompts: list[Conversation], seeds: list[int]) -> list[Completion]:
        engine.reset()
        return engine.generate(prompts, sampling, seeds=seeds)

    together = fresh(PROMPTS, [1, 2, 3])
    assert fresh(PROMPTS, [1, 2, 3]) == together
    assert fresh(PROMPTS[2:], [3]) == together[2:]
    assert fresh(PROMPTS, [9, 2, 3])[0] != together[0]


def test_int8_is_close_to_full_precision(engine: OpenVINOEngine, smollm: Path) -> None:
    reference = TransformersEngine(smollm, precision="fp32", device="cpu")
    quality = measure_quality(reference, engine, PROMPTS, Sampling(max_new_tokens=32, temperature=0.7))
    assert quality.rows == len(PROMPTS)
    assert abs(quality.difference) < 0.1
    prompts = [prompt.add("assistant", "The answer is: (") for prompt in PROMPTS]
    for ours, theirs in zip(engine.choose(prompts, ["A", "B"]), reference.choose(prompts, ["A", "B"]), strict=True):
        assert ours == pytest.approx(theirs, abs=0.1)


def test_long_options_count_with_their_likelihood(engine: OpenVINOEngine) -> None:
    options = [" Paris is the capital.", " Berlin is the capital."]
    row = engine.choose(PROMPTS[:1], options)[0]
    assert sum(row) == pytest.approx(1)
    assert row[0] > 0.9


def test_export_is_kept_under_the_weights_digest(tiny_model: Path, tmp_path: Path) -> None:
    first = export(tiny_model, tmp_path)
    stamp = (first / "openvino_model.bin").stat().st_mtime_ns
    assert export(tiny_model, tmp_path) == first
    assert (first / "openvino_model.bin").stat().st_mtime_ns == stamp
    assert [item.name for item in tmp_path.iterdir()] == [first.name]


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert not supports(tmp_path)
    with pytest.raises(ModelError, match="engine.kind"):
        export(tmp_path, tmp_path)


def test_prompt_beyond_the_context_is_named(engine: OpenVINOEngine) -> None:
    with pytest.raises(EngineError, match="Row 0 needs"):
        engine.generate([Conversation.user("word " * 9000)], Sampling(), seeds=[0])
