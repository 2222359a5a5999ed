"""Conversations and the readers of rows: real files in, rows or a located error out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.data import ROLES, Conversation, Message, Row, read_jsonl, read_rows
from charter.errors import DataError

ROWS: list[Row] = [
    {"prompt": "Hello", "response": "Hi"},
    {"prompt": [{"role": "user", "content": "Grüße 🌍"}], "response": "Hello"},
]


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_string_and_messages_are_the_same_prompt() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    assert Conversation.parse("Hello") == Conversation.parse(messages) == Conversation.user("Hello")
    assert Conversation.parse((Message("user", "Hello"),)).to_list() == messages


def test_add_leaves_the_original_alone() -> None:
    first = Conversation.user("Hello")
    assert first.add("assistant", "Hi").to_list()[-1] == {"role": "assistant", "content": "Hi"}
    assert first == Conversation.user("Hello")
    assert Conversation.parse(first) is first


@given(
    st.lists(st.tuples(st.sampled_from(ROLES), st.text()), min_size=1).filter(
        lambda turns: any(role == "user" and text.strip() for role, text in turns)
    )
)
def test_parse_undoes_to_list(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": text} for role, text in turns]
    assert Conversation.parse(messages).to_list() == messages


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "prompt is empty"),
        (" \n\t", "prompt is empty"),
        ([], "must be a string or a non-empty list"),
        (None, "not NoneType"),
        (7, "not int"),
        ({"role": "user"}, "not dict"),
        (["Hello"], r"prompt\[0\] must be a mapping"),
        ([{"role": "human", "content": "x"}], r"prompt\[0\]\.role is 'human'"),
        ([{"content": "x"}], r"prompt\[0\]\.role is 'None'"),
        ([{"role": ["user"], "content": "x"}], r"prompt\[0\]\.role"),
        ([{"role": "user", "content": None}], r"content must be a string, not NoneType"),
        ([{"role": "system", "content": "x"}], "no user turn with text"),
        ([{"role": "user", "content": " "}], "no user turn with text"),
        (b"Hello", r"prompt\[0\] must be a mapping"),
    ],
)
def test_prompt_that_cannot_be_read(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Conversation.parse(value)
    assert caught.value.fix


def test_error_repeats_no_text() -> None:
    with pytest.raises(DataError) as caught:
        Conversation.parse([{"role": "user", "content": ["a secret"]}], where="row 3")
    assert "secret" not in str(caught.value)
    assert "row 3[0].content" in str(caught.value)


def test_jsonl_round_trip_with_bom_and_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    assert list(read_jsonl(path)) == ROWS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    assert list(read_rows(path)) == ROWS


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": row["response"], "messages": [{"role": "user", "content": "é"}]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet", columns=["prompt", "messages"])) == rows


def test_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "a"}, {"prompt": "b"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    assert list(read_rows(tmp_path / "one")) == rows
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    )
    splits.save_to_disk(tmp_path / "two")
    assert list(read_rows(tmp_path / "two", split="test")) == rows[:1]
    with pytest.raises(DataError, match="has no split 'dev'; it has train, test"):
        list(read_rows(tmp_path / "two", split="dev"))


def test_readers_are_lazy(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\nnot json\n')
    rows = read_rows(path)
    assert next(rows) == {"prompt": "a"}
    with pytest.raises(DataError, match="line 2"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: not valid UTF-8 at byte 7"),
        (b'{"a": 1}\n\n{"a": }\n', r"line 3: not valid JSON \(Expecting value at column 7\)"),
        (b'[{"a": 1}]', r"line 1: a list, not an object"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"line 1: a number is too long"),
        (b'{"a": "\\ud800"}', r"line 1: a \\u escape is half a surrogate pair"),
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert caught.value.fix


def test_surrogate_pair_that_is_whole_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"a": "\ud83c\udf0d"}')
    assert list(read_rows(path)) == [{"a": "🌍"}]


@pytest.mark.parametrize("row", [{"prompt": "a"}, {"prompt": "a", "response": None}])
def test_missing_column_lists_what_is_there(tmp_path: Path, row: Row) -> None:
    path = write(tmp_path / "rows.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=r"row 3: column 'response' is missing or null; the row has prompt\.") as caught:
        list(read_rows(path, columns=("prompt", "response")))
    assert "prompt, response" in caught.value.fix


@pytest.mark.parametrize("name", ["absent.jsonl", "./absent", "/absent/rows", "~/absent-rows"])
def test_missing_file_is_not_looked_up_on_a_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="There is no file"):
        list(read_rows(name))


def test_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", ROWS)
    assert list(read_rows("~/rows.jsonl")) == ROWS


def test_files_that_are_not_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match="neither JSON Lines nor Parquet"):
        list(read_rows(tmp_path / "rows.csv"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(tmp_path / "rows.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder that datasets cannot load"):
        list(read_rows(tmp_path / "empty"))
