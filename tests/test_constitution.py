from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import pytest

from charter import constitution, resources
from charter.errors import DocumentError

SEED_THRESHOLDS = {
    "violence": 0.7,
    "hate_speech": 0.8,
    "misinformation": 0.6,
    "privacy_violation": 0.9,
    "illegal_activity": 0.85,
    "sexual_content": 0.75,
}
SMALL = """charter: 1
name: small
principles:
  - id: kind
    text: Be kind.
    weight: 2
    critique_request: [What is unkind, Who is hurt]
    revision_request:
      - Write it kindly.
      - Hurt nobody.
    preference_question: Which is kinder?
categories:
  - id: cruelty
    description: Cruel words.
    threshold: 0.5
    action: refuse
    principles: [kind]
    mlcommons: [S10]
    openai: [hate]
exemplars:
  - principle: kind
    prompt: Who are you?
    response: None of your business.
    critique: The answer is rude.
    revision: I am an assistant.
"""


def test_default_charter_holds_what_it_must() -> None:
    charter = constitution.default()
    assert [item.text for item in charter.principles] == [
        "Be helpful and provide accurate information.",
        "Avoid harmful, illegal, or unethical content.",
        "Respect human autonomy and dignity.",
        "Be honest about limitations and uncertainty.",
        "Protect privacy and confidentiality.",
    ]
    thresholds = {item.id: item.threshold for item in charter.categories}
    assert {name: thresholds[name] for name in SEED_THRESHOLDS} == SEED_THRESHOLDS
    assert set(thresholds) == {*SEED_THRESHOLDS, "self_harm", "child_safety"}
    assert [item.id for item in charter.categories if item.always_block] == ["child_safety"]
    assert all(item.principles for item in charter.categories)
    assert len(charter.exemplars) >= 3


def test_default_wordings_are_many_and_all_different() -> None:
    charter = constitution.default()
    critiques = [wording for item in charter.principles for wording in item.critique_request]
    revisions = [wording for item in charter.principles for wording in item.revision_request]
    assert len(set(critiques)) == len(critiques) >= 20
    assert len(set(revisions)) == len(revisions) >= 20
    assert all(len(item.critique_request) >= 4 for item in charter.principles)
    assert all(len(set(item.preference_question)) >= 2 for item in charter.principles)


def test_default_covers_every_code_of_both_taxonomies() -> None:
    charter = constitution.default()
    assert {code for item in charter.categories for code in item.mlcommons} == set(constitution.MLCOMMONS_HAZARDS)
    assert {name for item in charter.categories for name in item.openai} == set(constitution.OPENAI_CATEGORIES)


def test_look_up_by_id() -> None:
    charter = constitution.parse(SMALL)
    assert charter.principle("kind").weight == 2.0
    assert charter.principle("kind").preference_question == ("Which is kinder?",)
    assert charter.category("cruelty").openai == ("hate",)
    with pytest.raises(KeyError):
        charter.principle("cruelty")


def test_loaded_file_is_the_parsed_text(tmp_path: Path) -> None:
    path = tmp_path / "charter.yaml"
    path.write_text(constitution.default_text(), encoding="utf-8")
    assert constitution.load(path) == constitution.default()
    assert resources.path("charter.yaml").read_text("utf-8") == constitution.default_text()


def test_digest_ignores_key_order_quotes_and_defaults() -> None:
    digest = constitution.parse(SMALL).digest
    reordered = SMALL.replace("charter: 1\nname: small\n", "name: 'small'\ncharter: 1\ndescription: ''\n")
    assert reordered != SMALL
    assert constitution.parse(reordered).digest == digest
    assert constitution.parse(SMALL.replace("weight: 2", "weight: 2.0")).digest == digest


@pytest.mark.parametrize("old", ["Be kind", "Write it kindly", "Which is kinder", "Cruel words", "None of your", "S10"])
def test_digest_changes_with_every_word(old: str) -> None:
    new = "S11" if old == "S10" else "Other words"
    assert constitution.parse(SMALL.replace(old, new)).digest != constitution.parse(SMALL).digest


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "message"),
    [
        ("name: small", "name: ''", 2, "name", "the text is empty"),
        ("charter: 1", "charter: 2\nnew_key: 1", 1, "charter", "format 2 is not known. Write `charter: 1`."),
        ("charter: 1\n", "", 1, "", "the key `charter` is missing"),
        ("id: kind", "id: Kind", 4, "principles[0].id", "is not an identifier"),
        ("id: cruelty", "id: 2nd", 13, "categories[0].id", "is not an identifier"),
        ("text: Be kind.", "text: ' '", 5, "principles[0].text", "the text is empty"),
        ("weight: 2", "weight: 0", 6, "principles[0].weight", "Use a number above 0"),
        ("weight: 2", "weight: -1", 6, "principles[0].weight", "Use a number above 0"),
        ("weight: 2", "weight: .nan", 6, "principles[0].weight", "must be a number"),
        ("weight: 2", "weight: heavy", 6, "principles[0].weight", "must be a number, not 'heavy'"),
        ("      - Hurt nobody.\n", "", 8, "principles[0].revision_request", "1 revision requests for 2"),
        ("Hurt nobody.", "''", 10, "principles[0].revision_request[1]", "the text is empty"),
        ("[What is unkind, Who is hurt]", "[]", 7, "principles[0].critique_request", "there is no wording"),
        ("threshold: 0.5", "threshold: 0", 15, "categories[0].threshold", "between 0 and 1"),
        ("threshold: 0.5", "threshold: 1", 15, "categories[0].threshold", "between 0 and 1"),
        ("Cruel words.", "''", 14, "categories[0].description", "the text is empty"),
        ("    description: Cruel words.\n", "", 13, "categories[0]", "the key `description` is missing"),
        (
            "action: refuse",
            "action: allow\n    always_block: true",
            16,
            "categories[0].action",
            "cannot be allowed. Use `refuse`",
        ),
        ("principles: [kind]", "principles: [knd]", 17, "categories[0].principles[0]", "Did you mean `kind`?"),
        ("principles: [kind]", "principles: [kind, kind]", 17, "categories[0].principles[1]", "stands twice"),
        ("[S10]", "[s10]", 18, "categories[0].mlcommons[0]", "Did you mean `S10`?"),
        ("[S10]", "[S1, S15]", 18, "categories[0].mlcommons[1]", "'S15' is not known"),
        ("[hate]", "[hate/threat]", 19, "categories[0].openai[0]", "Did you mean `hate/threatening`?"),
        ("- principle: kind", "- principle: mean", 21, "exemplars[0].principle", "Use one of kind"),
        ("critique: The answer is rude.", "critique: ''", 24, "exemplars[0].critique", "the text is empty"),
    ],
)
def test_error_has_line_key_and_fix(old: str, new: str, line: int, key: str, message: str) -> None:
    assert SMALL.count(old) == 1
    with pytest.raises(DocumentError) as caught:
        constitution.parse(SMALL.replace(old, new))
    assert (caught.value.line, caught.value.key) == (line, key)
    assert message in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize("name", ["principles", "categories"])
def test_empty_list_is_refused(name: str) -> None:
    lists = {"principles": "[]", "categories": "[]"}
    if name == "categories":
        lists["principles"] = "[{id: a, text: t, critique_request: c, revision_request: r, preference_question: p}]"
    text = f"charter: 1\nname: x\nprinciples: {lists['principles']}\ncategories: {lists['categories']}\n"
    with pytest.raises(DocumentError, match="the list is empty") as caught:
        constitution.parse(text)
    assert caught.value.key == name
    assert caught.value.line == (3 if name == "principles" else 4)


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


def test_documented_example_is_a_charter() -> None:
    page = (Path(__file__).parents[1] / "docs" / "charter-format.md").read_text("utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    assert constitution.parse(example).name == "small"
    for names in (constitution.OPENAI_CATEGORIES, get_args(constitution.Action)):
        assert all(f"`{name}`" in page for name in names)
    for cls in (constitution.Charter, constitution.Principle, constitution.HarmCategory, constitution.Exemplar):
        assert all(f"`{field.name}`" in page for field in dataclasses.fields(cls))
