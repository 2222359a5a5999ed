"""The shipped example files: counts, fields, splits, and no text twice."""

from __future__ import annotations

import re
from collections import Counter
from statistics import mean

import pytest

from charter import constitution, resources
from charter.data import Row, read_jsonl

COUNTS = {
    "redteam": {"train": 64, "eval": 32},
    "helpful": {"train": 80, "eval": 32},
    "lookalikes": {"eval": 40},
}
IDENTIFIER = {"redteam": "redteam", "helpful": "helpful", "lookalikes": "lookalike"}
SUBSETS = ("helpful", "harmless", "honest")


def rows(name: str) -> list[Row]:
    return list(read_jsonl(resources.path(f"{name}.jsonl")))


def normalise(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_splits(name: str) -> None:
    assert Counter(row["split"] for row in rows(name)) == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_ids_are_unique_and_in_order(name: str) -> None:
    found = rows(name)
    assert [row["id"] for row in found] == [f"{IDENTIFIER[name]}-{i:03d}" for i in range(1, len(found) + 1)]


def test_fields() -> None:
    assert all(set(row) == {"id", "prompt", "category", "split"} for row in rows("redteam"))
    assert all(set(row) == {"id", "prompt", "response", "split"} for row in rows("helpful"))
    assert all(set(row) == {"id", "prompt", "split"} for row in rows("lookalikes"))
    assert all(set(row) == {"prompt", "corrects", "incorrects", "subset"} for row in rows("comparisons"))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_redteam_categories_are_the_charters_and_evenly_spread(split: str) -> None:
    counts = Counter(row["category"] for row in rows("redteam") if row["split"] == split)
    known = {category.id for category in constitution.default().categories}
    assert set(counts) == known - {"child_safety"}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_helpful_responses() -> None:
    for row in rows("helpful"):
        if row["split"] == "train":
            assert 25 <= len(row["response"].split()) <= 70, row["id"]
        else:
            assert row["response"] is None, row["id"]


def test_comparisons_have_one_clear_answer_of_similar_length() -> None:
    found = rows("comparisons")
    assert Counter(row["subset"] for row in found) == dict.fromkeys(SUBSETS, 20)
    for row in found:
        assert len(row["corrects"]) == len(row["incorrects"]) == 1
        ratio = len(row["corrects"][0]) / len(row["incorrects"][0])
        assert 0.75 <= ratio <= 1.34, row["prompt"]


@pytest.mark.parametrize("subset", SUBSETS)
def test_length_does_not_decide_comparisons(subset: str) -> None:
    found = [row for row in rows("comparisons") if row["subset"] == subset]
    # 1 where the correct answer is longer, 0.5 where the two are equal: the accuracy of a rule that picks the longer.
    wins = [
        (len(row["corrects"][0]) > len(row["incorrects"][0])) / 2
        + (len(row["corrects"][0]) >= len(row["incorrects"][0])) / 2
        for row in found
    ]
    assert 0.35 <= mean(wins) <= 0.65


def test_no_text_is_empty_or_padded() -> None:
    for name in (*COUNTS, "comparisons"):
        for row in rows(name):
            answers = [*row.get("corrects", []), *row.get("incorrects", [])]
            if row.get("response") is not None:
                answers.append(row["response"])
            for text in (row["prompt"], *answers):
                assert normalise(text), row
                assert text == text.strip(), row


def test_no_prompt_appears_twice_in_any_file() -> None:
    prompts = Counter(normalise(row["prompt"]) for name in (*COUNTS, "comparisons") for row in rows(name))
    assert [prompt for prompt, count in prompts.items() if count > 1] == []


def test_no_near_duplicate_between_train_and_held_out_prompts() -> None:
    def trigrams(text: str) -> set[tuple[str, ...]]:
        words = normalise(text).split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    everything = [row for name in (*COUNTS, "comparisons") for row in rows(name)]
    train = [trigrams(row["prompt"]) for row in everything if row.get("split") == "train"]
    for row in everything:
        if row.get("split") != "train":
            held_out = trigrams(row["prompt"])
            assert max(len(held_out & one) / len(held_out | one) for one in train) < 0.5, row["prompt"]
