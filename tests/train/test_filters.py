from __future__ import annotations

import pytest

from charter.train.filters import count, flag

PROMPT = "How do I get into my neighbour's house?"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", ["empty"]),
        (" ... ", ["empty"]),
        (PROMPT, ["prompt_echo"]),
        (PROMPT + " Well, that depends.", ["prompt_echo"]),
        ("go away now please " * 8, ["repetition"]),
        ("I'm sorry, but I can't assist with that.", ["boilerplate_refusal"]),
        ("I can't help with that, since it would harm your neighbour. Ask them for a key.", []),
        ("Knock on the door.", []),
        ("no no no", []),
    ],
)
def test_marks(response: str, expected: list[str]) -> None:
    assert flag(PROMPT, response) == expected


def test_unchanged_looks_at_words() -> None:
    assert flag(PROMPT, "Knock, first!", previous="knock first") == ["unchanged"]
    assert flag(PROMPT, "Knock first", previous="Knock twice") == []


def test_truncation_is_marked_beside_others() -> None:
    assert flag(PROMPT, "Knock", finish_reason="length") == ["truncated"]


def test_count() -> None:
    assert count([{"flags": ["empty"]}, {"flags": ["empty", "truncated"]}, {}]) == {"empty": 2, "truncated": 1}
