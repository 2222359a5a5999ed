from __future__ import annotations

from typing import Any

import pytest

from charter import constitution
from charter.data import Conversation
from charter.train import preferences
from charter.train.preferences import PreferencesConfig
from engines import ScriptedEngine

CHARTER = constitution.default()
PROMPTS = [{"id": f"p{index}", "prompt": f"Question {index}?"} for index in range(6)]
CONFIG = PreferencesConfig(principles=3)


def pairs() -> list[dict[str, Any]]:
    return preferences.sample(PROMPTS, ScriptedEngine(), CONFIG, charter=CHARTER, seed=0)


def good_first(prompt: Conversation) -> tuple[float, float]:
    """Knows which answer is better wherever it stands: the one with the smaller number."""
    text = prompt.messages[0].content
    first, second = (int(part.split()[1]) for part in (text.split("(A) ")[1], text.split("(B) ")[1]))
    return (0.9, 0.1) if first < second else (0.1, 0.9)


def test_two_different_answers_a_prompt() -> None:
    rows = pairs()
    assert [row["id"] for row in rows] == [row["id"] for row in PROMPTS]
    assert all(row["response_a"] != row["response_b"] for row in rows)
    assert rows == pairs()


def test_a_model_that_always_prefers_the_first_option_says_nothing() -> None:
    rows = preferences.label(pairs(), ScriptedEngine(prefer=lambda _: (1.0, 0.0)), CHARTER, CONFIG, seed=0)
    assert all(row["probability"] == pytest.approx(0.5) for row in rows)
    assert all(row["position_bias"] == pytest.approx(0.5) for row in rows)
    summary = preferences.summary(rows)
    assert summary["position_bias"]["value"] == pytest.approx(0.5)
    assert summary["order_agreement"] == 0
    assert summary["confidence"] == pytest.approx(0)


def test_a_model_that_knows_labels_softly_and_without_bias() -> None:
    rows = preferences.label(pairs(), ScriptedEngine(prefer=good_first), CHARTER, CONFIG, seed=0)
    for row in rows:
        numbers = int(row["chosen"].split()[1]), int(row["rejected"].split()[1])
        assert numbers[0] < numbers[1]
        assert row["label"] == pytest.approx(0.9)
        assert row["position_bias"] == pytest.approx(0)
        assert len({vote["principle"] for vote in row["by_principle"]}) == 3
    summary = preferences.summary(rows)
    assert summary["order_agreement"] == 1
    assert sum(item["count"] for item in summary["histogram"]) == len(rows)


def test_both_orders_are_asked_with_the_letters_prefilled() -> None:
    engine = ScriptedEngine()
    preferences.label(pairs()[:1], engine, CHARTER, PreferencesConfig(principles=1), seed=0)
    first, second = (item.messages[0].content for item in engine.chosen)
    row = pairs()[0]
    assert first.index(row["response_a"]) < first.index(row["response_b"])
    assert second.index(row["response_b"]) < second.index(row["response_a"])
    assert all(item.messages[-1].content == "The answer is: (" for item in engine.chosen)


def test_chain_of_thought_is_clamped() -> None:
    config = PreferencesConfig(principles=1, chain_of_thought=True)
    engine = ScriptedEngine(prefer=good_first)
    rows = preferences.label(pairs(), engine, CHARTER, config, seed=0)
    assert all(row["label"] == pytest.approx(0.6) for row in rows)
    assert engine.asked


def test_training_rows_leave_out_what_cannot_train() -> None:
    rows = preferences.label(pairs(), ScriptedEngine(prefer=good_first), CHARTER, CONFIG, seed=0)
    rows[0]["response_b"] = rows[0]["response_a"]
    rows[1]["flags_a"] = ["repetition"]
    rows[2]["flags_b"] = ["truncated"]
    kept = preferences.training_rows(rows)
    assert len(kept) == len(rows) - 2
    assert kept[0]["chosen"][0]["role"] == "assistant"
    assert kept[0]["probability"] == pytest.approx(0.9)
    assert preferences.summary(rows)["kept"] == len(rows) - 2


def test_calibration_knows_a_good_judge_from_a_biased_one() -> None:
    items = [
        {"id": str(index), "prompt": "Say.", "corrects": [f"answer {index}"], "incorrects": [f"answer {index + 100}"]}
        for index in range(20)
    ]
    rows = [{**item, "subset": "helpful"} for item in items]
    good = preferences.calibrate(rows, ScriptedEngine(prefer=good_first), CHARTER, seed=0)
    assert good["accuracy"] == 1
    assert good["calibration"] == [{"predicted": pytest.approx(0.9), "observed": 1.0, "count": 20}]
    biased = preferences.calibrate(rows, ScriptedEngine(prefer=lambda _: (0.8, 0.2)), CHARTER, seed=0)
    assert biased["calibration"][0]["predicted"] == pytest.approx(0.5)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="clamp_low"):
        PreferencesConfig(clamp_low=0.7)
