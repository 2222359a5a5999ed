from __future__ import annotations

from pathlib import Path

import pytest

from charter import constitution
from charter.errors import DocumentError


def test_default_charter_holds_what_it_must() -> None:
    charter = constitution.default()
    assert len(charter.principles) == 5
    assert sum(len(item.critique_request) for item in charter.principles) >= 16
    thresholds = {item.id: item.threshold for item in charter.categories}
    assert thresholds["privacy_violation"] == 0.9
    assert charter.category("child_safety").always_block
    assert {code for item in charter.categories for code in item.mlcommons} == set(constitution.MLCOMMONS_HAZARDS)
    assert {name for item in charter.categories for name in item.openai} == set(constitution.OPENAI_CATEGORIES)


def test_digest_covers_meaning_and_not_layout() -> None:
    text = constitution.default_text()
    digest = constitution.default().digest
    assert constitution.parse("# a comment\n" + text + "\n\n").digest == digest
    assert constitution.parse(text.replace("threshold: 0.7\n", "threshold: 0.71\n", 1)).digest != digest


@pytest.mark.parametrize(
    ("old", "new", "key", "message"),
    [
        ("threshold: 0.7\n", "threshold: 7\n", "categories[0].threshold", "between 0 and 1"),
        ("threshold: 0.7\n", "treshold: 0.7\n", "categories[0].treshold", "Did you mean `threshold`"),
        (
            "principles: [harmless]\n",
            "principles: [harmles]\n",
            "categories[0].principles[0]",
            "Did you mean `harmless`",
        ),
        ("mlcommons: [S1, S9]", "mlcommons: [S1, S99]", "categories[0].mlcommons[1]", "'S99' is not known"),
        ("id: honest", "id: helpful", "principles[3].id", "stands twice"),
        ("action: refuse", "action: refuze", "categories[0].action", "Did you mean `refuse`"),
        ("charter: 1", "charter: 2", "charter", "format 2"),
    ],
)
def test_error_names_line_key_and_fix(old: str, new: str, key: str, message: str) -> None:
    text = constitution.default_text()
    position = text.index(old)
    with pytest.raises(DocumentError) as caught:
        constitution.parse(text[:position] + new + text[position + len(old) :])
    assert caught.value.key == key
    assert message in str(caught.value)
    assert caught.value.line is not None
    assert abs(caught.value.line - (text[:position].count("\n") + 1)) <= 1


def test_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "charter.yaml"
    path.write_bytes(b"name: \xff")
    with pytest.raises(DocumentError, match="not valid UTF-8 at byte 6"):
        constitution.load(path)
