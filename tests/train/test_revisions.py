from __future__ import annotations

from collections import Counter

from charter import constitution
from charter.critique import CritiqueConfig
from charter.train.revisions import RevisionsConfig, draw, final_rows, run
from engines import ScriptedEngine

CHARTER = constitution.default()
CONFIG = RevisionsConfig(rounds=3, critique=CritiqueConfig(exemplars=0))
PROMPTS = [{"id": f"p{index}", "prompt": f"How do I break lock {index}?"} for index in range(5)]


def test_every_intermediate_is_kept_in_order() -> None:
    rows = run(PROMPTS, ScriptedEngine(), CHARTER, CONFIG, seed=0)
    assert [(row["id"], row["round"]) for row in rows] == [(p["id"], n) for p in PROMPTS for n in range(4)]
    for row in rows:
        assert row["charter"] == CHARTER.digest
        assert row["engine"] == "scripted"
        assert (row["principle"] is None) == (row["round"] == 0)


def test_each_round_starts_from_the_one_before() -> None:
    engine = ScriptedEngine()
    rows = run(PROMPTS[:1], engine, CHARTER, CONFIG, seed=0)
    critiques = engine.asked[1::2]
    assert [item.messages[1].content for item in critiques] == [row["response"] for row in rows[:-1]]


def test_rows_depend_on_the_prompt_and_not_on_the_batch() -> None:
    together = run(PROMPTS, ScriptedEngine(), CHARTER, CONFIG, seed=0)
    alone = run(PROMPTS[2:3], ScriptedEngine(), CHARTER, CONFIG, seed=0)
    assert alone == [row for row in together if row["id"] == "p2"]
    assert run(PROMPTS, ScriptedEngine(), CHARTER, CONFIG, seed=1) != together


def test_draws_cover_principles_by_weight_and_all_wordings() -> None:
    drawn = Counter()
    for index in range(4000):
        principle, wording = draw(CHARTER, 0, f"p{index}", 1)
        drawn[principle.id, wording] += 1
    assert len(drawn) == sum(len(item.critique_request) for item in CHARTER.principles)
    share = sum(count for (name, _), count in drawn.items() if name == "harmless") / 4000
    expected = CHARTER.principle("harmless").weight / sum(item.weight for item in CHARTER.principles)
    assert abs(share - expected) < 0.03


def test_final_row_is_the_last_good_revision() -> None:
    def row(number: int, flags: list[str]) -> dict[str, object]:
        return {"id": "a", "round": number, "prompt": [], "response": f"r{number}", "flags": flags}

    rows = [row(0, []), row(1, ["truncated"]), row(2, ["repetition"]), {**row(1, ["empty"]), "id": "b"}]
    assert [(item["id"], item["response"]) for item in final_rows(rows)] == [("a", "r1")]
