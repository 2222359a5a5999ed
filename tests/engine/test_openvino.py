from __future__ import annotations

import json
import os
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
    quality = measure_quality(reference, engine, PROMPTS, Sampling(max_new_tokens=16, temperature=0.7))
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
    abandoned, under_way = tmp_path / ".partial-abandoned", tmp_path / ".partial-under-way"
    abandoned.mkdir()
    under_way.mkdir()
    os.utime(abandoned, (0, 0))
    first = export(tiny_model, tmp_path)
    stamp = (first / "openvino_model.bin").stat().st_mtime_ns
    assert export(tiny_model, tmp_path) == first
    assert (first / "openvino_model.bin").stat().st_mtime_ns == stamp
    assert {item.name for item in tmp_path.iterdir()} == {first.name, under_way.name}


@pytest.mark.parametrize(
    ("settings", "fits"),
    [
        ({"model_type": "llama"}, True),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, True),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, False),
        ({"model_type": "llama", "rope_scaling": {"type": "longrope"}}, False),
        ({"model_type": "llama", "hidden_act": "gelu"}, False),
        ({"model_type": "llama", "quantization_config": {}}, False),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, False),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None}, True),
        ({"model_type": "mistral", "max_position_embeddings": 2048, "sliding_window": 4096}, True),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 4096}, True),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096}, False),
    ],
)
def test_what_the_graph_lacks_is_refused(settings: dict[str, object], fits: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert supports(tmp_path) is fits


def test_scores_are_finer_than_bf16(engine: OpenVINOEngine) -> None:
    prompts = [Conversation.user(f"Is {n} an even number?").add("assistant", "The answer is (") for n in range(12)]
    assert len({row[0] for row in engine.choose(prompts, ["A", "B"])}) == len(prompts)


def test_score_does_not_depend_on_the_batch(engine: OpenVINOEngine) -> None:
    texts = [" Paris.", " Red, green and blue, which are three of the many colours that there are.", " Rain falls."]
    together = engine.loglikelihood(PROMPTS, texts)
    for prompt, text, score in zip(PROMPTS, texts, together, strict=True):
        alone = engine.loglikelihood([prompt], [text])[0]
        assert alone.tokens == score.tokens
        # The runtime quantises activations in some batch sizes and not in others.
        assert alone.mean == pytest.approx(score.mean, abs=0.05)


def test_stop_string_ends_a_row_early(engine: OpenVINOEngine) -> None:
    engine.reset()
    full = engine.generate(PROMPTS, Sampling(max_new_tokens=40, temperature=0), seeds=[0, 0, 0])
    finished: list[int] = []
    engine.reset()
    stopped = engine.generate(
        PROMPTS, Sampling(max_new_tokens=40, temperature=0, stop=("e",)), seeds=[0, 0, 0], progress=finished.append
    )
    for whole, cut in zip(full, stopped, strict=True):
        assert cut.text == whole.text.split("e")[0].strip()
        assert cut.finish_reason == "stop"
        assert cut.completion_tokens < whole.completion_tokens
    assert sum(finished) == len(PROMPTS)


def test_interrupted_call_leaves_nothing_for_the_next(engine: OpenVINOEngine) -> None:
    def interrupt(_rows: int) -> None:
        raise KeyboardInterrupt

    sampling = Sampling(max_new_tokens=32, temperature=0)
    engine.reset()
    expected = engine.generate(PROMPTS[1:], sampling, seeds=[0, 0])
    with pytest.raises(KeyboardInterrupt):  # when the first, short answer is done and the poem is under way
        engine.generate(PROMPTS, sampling, seeds=[0, 0, 0], progress=interrupt)
    assert engine._pipeline is None or not engine._pipeline.has_non_finished_requests()
    assert engine.generate(PROMPTS[1:], sampling, seeds=[0, 0]) == expected


def test_tiny_random_model_is_exported_and_runs(tiny_model: Path, tmp_path: Path) -> None:
    tiny = OpenVINOEngine(export(tiny_model, tmp_path), tiny_model)
    reference = TransformersEngine(tiny_model, precision="fp32", device="cpu")
    texts = [" one", " two and three", " four"]
    pairs = zip(tiny.loglikelihood(PROMPTS, texts), reference.loglikelihood(PROMPTS, texts), strict=True)
    assert all(ours.mean == pytest.approx(theirs.mean, abs=0.5) for ours, theirs in pairs)
    assert all(item.completion_tokens for item in tiny.generate(PROMPTS, Sampling(max_new_tokens=4), seeds=[1, 2, 3]))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert not supports(tmp_path)
    with pytest.raises(ModelError, match="engine.kind"):
        export(tmp_path, tmp_path)


def test_prompt_beyond_the_context_is_named(engine: OpenVINOEngine) -> None:
    with pytest.raises(EngineError, match="Row 0 needs"):
        engine.generate([Conversation.user("word " * 9000)], Sampling(), seeds=[0])
