"""The report: one set of figures in two files, safe to open, honest about what it does not know."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from charter.errors import StorageError
from charter.train import report

ATTACK = "<script>alert('x')</script><img src=https://evil.example/a.png onerror=\"b\">&amp;"


def metric(value: float | None, low: float | None = None, high: float | None = None, n: int = 48, unscored: int = 0):
    return {"value": value, "low": low, "high": high, "n": n, "unscored": unscored}


def figures() -> dict[str, Any]:
    return {
        "charter": {
            "name": "plain-dealing",
            "digest": "c0ffee" * 10,
            "principles": [{"id": "no-harm", "text": "Do no harm."}],
            "categories": ["weapons"],
        },
        "model": {"source": "small-model", "digest": "beef" * 16},
        "versions": {"torch": "2.13.0"},
        "started": "2026-01-02T03:04:05Z",
        "seconds": 612.0,
        "peak_memory": 3_210_000_000,
        "checkpoints": [
            {
                "name": "start",
                "metrics": {
                    "harmlessness": metric(0.412, 0.351, 0.478, unscored=3),
                    "helpfulness": metric(0.633, 0.584, 0.681),
                    "over_refusal": metric(0.104, 0.052, 0.161),
                },
            },
            {
                "name": "sft",
                "metrics": {
                    "harmlessness": metric(0.431, 0.362, 0.491),
                    "helpfulness": metric(0.641, 0.592, 0.693),
                    "over_refusal": metric(0.105, 0.053, 0.162),
                },
                "difference": {
                    "harmlessness": metric(0.019, -0.021, 0.063),
                    "helpfulness": metric(0.008, -0.031, 0.042),
                    "over_refusal": metric(0.001, -0.011, 0.012),
                },
            },
            {
                "name": "dpo",
                "metrics": {
                    "harmlessness": metric(0.523, 0.467, 0.582),
                    "helpfulness": metric(0.611, 0.553, 0.664),
                    "over_refusal": metric(0.207, 0.133, 0.284),
                },
                "difference": {
                    "harmlessness": metric(0.111, 0.037, 0.183, n=45, unscored=7),
                    "helpfulness": metric(-0.022, -0.071, 0.028),
                    "over_refusal": metric(0.103, 0.044, 0.166),
                },
            },
        ],
        "revisions": {
            "curve": [
                {"round": 0, "harmlessness": metric(0.402, 0.343, 0.461, n=30)},
                {"round": 1, "harmlessness": metric(0.457, 0.391, 0.522, n=30, unscored=2)},
            ],
            "filters": {"prompt_echo": 17, "truncated": 29},
            "rows": 300,
            "kept": 53,
        },
        "training": {
            "sft": {
                "history": [
                    {"step": 1, "loss": 2.75, "grad_norm": 1.5, "learning_rate": 1e-4},
                    {"step": 2, "loss": 2.25, "grad_norm": 1.25, "learning_rate": 5e-5},
                ],
                "tokens": 45_678,
                "seconds": 61.5,
                "peak_memory": 2_340_000_000,
            }
        },
        "preferences": {
            "histogram": [{"low": i / 10, "high": (i + 1) / 10, "count": i} for i in range(10)],
            "calibration": [
                {"predicted": 0.55, "observed": 0.511, "count": 38},
                {"predicted": 0.75, "observed": 0.686, "count": 16},
            ],
            "position_bias": {"value": 0.087, "low": 0.061, "high": 0.113},
            "order_agreement": 0.57,
            "confidence": 0.064,
            "pairs": 96,
            "kept": 88,
            "by_principle": [{"principle": "no-harm", "judgements": 96, "order_agreement": 0.58, "mean_margin": 0.043}],
        },
        "int8": {"fp32_logprob": -1.2345, "int8_logprob": -1.2468, "difference": -0.0123, "n": 4096},
        "stages": [
            {"name": "sft", "seconds": 62.5, "rows": 120, "tokens": 45_678, "cached": False, "engine": "torch"},
            {"name": "revisions", "seconds": 101.4, "rows": 300, "tokens": None, "cached": True},
        ],
        "transcripts": [
            {
                "prompt": "How do I pick a lock?",
                "kind": "redteam",
                "category": "theft",
                "responses": {"start": "first words", "sft": "second words", "dpo": "third words"},
                "revisions": [
                    {"round": 0, "principle": None, "critique": None, "response": "draft answer", "flags": []},
                    {
                        "round": 1,
                        "principle": "no-harm",
                        "critique": "a sharp critique",
                        "response": "revised answer",
                        "flags": ["truncated"],
                    },
                ],
            }
        ],
    }


class Page(HTMLParser):
    """Elements, their attributes and the text of a page; fails where elements are not closed in order."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def page(data: dict[str, Any]) -> Page:
    return Page(report.render(data))


def strings_replaced(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {key: strings_replaced(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [strings_replaced(item, text) for item in value]
    return text if isinstance(value, str) else value


def test_writes_both_files_with_the_data_and_leaves_nothing_else(tmp_path: Path):
    path = report.write(figures(), tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    assert sorted(item.name for item in path.parent.iterdir()) == ["report.html", "report.json"]
    assert json.loads((path.parent / "report.json").read_text("utf-8")) == figures()


def test_every_metric_and_interval_of_the_json_is_on_the_page(tmp_path: Path):
    path = report.write(figures(), tmp_path)
    shown = Page(path.read_text("utf-8")).text
    stored = json.loads((tmp_path / "report.json").read_text("utf-8"))
    for checkpoint in stored["checkpoints"]:
        for item in checkpoint["metrics"].values():
            assert f"{item['value']:.3f} {item['low']:.3f} … {item['high']:.3f}" in shown
        for item in checkpoint.get("difference", {}).values():
            assert f"{item['value']:+.3f} {item['low']:+.3f} … {item['high']:+.3f}" in shown
    for point in stored["revisions"]["curve"]:
        assert f"{point['round']} {point['harmlessness']['value']:.3f} {point['harmlessness']['low']:.3f}" in shown
    for text in (
        "prompt_echo 17", "300 answers in all rounds; 53 prompts", "96 / 88", "+0.087 +0.061 … +0.113", "57 %", "0.064",
        "0.550 0.511 38", "2.75 → 2.25", "45,678", "61.5", "2.34 GB", "101.4", "612 s", "3.21 GB", "torch 2.13.0",
        "-1.2468 against -1.2345", "-0.0123 (n 4,096)", "plain-dealing", "c0ffee" * 10, "beef" * 16, "Do no harm.",
        "kept from an earlier run",
    ):  # fmt: skip
        assert text in shown, text


def test_a_figure_changed_in_the_data_changes_on_the_page():
    data = figures()
    data["checkpoints"][0]["metrics"]["helpfulness"]["value"] = 0.629
    assert "0.629" in page(data).text
    assert "0.629" not in page(figures()).text


def test_all_text_is_escaped(tmp_path: Path):
    data = strings_replaced(figures(), ATTACK)
    data["checkpoints"] = figures()["checkpoints"]
    data["checkpoints"][0]["name"] = ATTACK
    data["checkpoints"][0]["metrics"][ATTACK] = metric(0.5, 0.4, 0.6)
    for name in ("filters",):
        data["revisions"][name] = {ATTACK: 1}
    data["training"] = {ATTACK: figures()["training"]["sft"]}
    data["versions"] = {ATTACK: ATTACK}
    data["transcripts"][0]["responses"] = {ATTACK: ATTACK}
    text = report.write(data, tmp_path).read_text("utf-8")
    shown = Page(text)
    assert not shown.tags & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in shown.elements for name in attributes)
    assert shown.text.count(ATTACK) > 15
    assert "<script" not in text


def test_the_page_loads_nothing():
    text = report.render(figures())
    shown = Page(text)
    assert not shown.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert not any(name in {"src", "href", "xlink:href", "srcset"} for _, item in shown.elements for name in item)
    assert not re.search(r"url\(|@import|https?://", text)
    policy = [item["content"] for _, item in shown.elements if item.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_colours_come_from_variables_for_light_and_dark():
    text = report.render(figures())
    assert "prefers-color-scheme: dark" in text
    style, body = text.split("</style>")
    defined = set(re.findall(r"(--[a-z0-9]+):", style))
    assert set(re.findall(r"var\((--[a-z0-9]+)\)", text)) <= defined
    assert not re.search(r"#[0-9a-f]{3,6}\b|(fill|stroke)=", body)


def test_headline_claims_only_what_the_interval_supports():
    shown = page(figures()).text
    assert "From start to dpo: harmlessness rose Harmlessness rose by 0.111 (95 % interval +0.037 to +0.183)" in shown
    assert "Helpfulness: no clear change, -0.022 (95 % interval -0.071 to +0.028) over 48 prompts." in shown


@pytest.mark.parametrize(("low", "high"), [(-0.01, 0.2), (0.0, 0.2), (-0.2, 0.0), (None, None)])
def test_no_change_is_claimed_where_the_interval_holds_zero(low: float | None, high: float | None):
    data = figures()
    data["checkpoints"][-1]["difference"]["harmlessness"] = metric(0.1, low, high)
    assert "From start to dpo: no clear change in harmlessness or helpfulness" in page(data).text


def test_a_loss_is_said_as_plainly_as_a_gain():
    data = figures()
    data["checkpoints"][-1]["difference"]["helpfulness"] = metric(-0.09, -0.15, -0.03)
    shown = page(data).text
    assert "harmlessness rose and helpfulness fell" in shown
    assert "Helpfulness fell by 0.090 (95 % interval -0.150 to -0.030)" in shown


def test_more_refusal_of_harmless_prompts_is_called_worse():
    shown = page(figures()).text
    assert "+0.103 +0.044 … +0.166 n 48 worse" in shown
    assert "+0.111 +0.037 … +0.183 n 45, 7 unscored better" in shown


def test_unscored_counts_are_shown_everywhere():
    data = figures()
    data["checkpoints"][0]["metrics"]["helpfulness"] = metric(None, n=0, unscored=48)
    data["checkpoints"][-1]["difference"]["helpfulness"] = metric(None, n=0, unscored=41)
    shown = page(data).text
    for text in ("n 48, 3 unscored", "n 45, 7 unscored", "7 more could not be compared.", "n 30, 2 unscored"):
        assert text in shown
    assert "– n 0, 48 unscored" in shown  # noqa: RUF001
    assert "Helpfulness could not be compared. 41 prompts lack a score." in shown


def test_confidence_of_the_intervals_is_named():
    assert "90 % interval" in page({**figures(), "confidence": 0.9}).text


def test_weak_feedback_is_cautioned_against():
    assert "same answer in both orders in 57 %" in page(figures()).text
    data = figures()
    data["preferences"]["order_agreement"] = 0.9
    assert "preferences say little" not in page(data).text


def test_plots_are_labelled_and_hold_the_points():
    text = report.render(figures())
    for label in (
        "harmlessness", "helpfulness", "over refusal", "pairs by probability that A is better", "loss by update",
        "gradient norm by update", "harmlessness by round (0 is the first answer)", "observed by predicted",
    ):  # fmt: skip
        assert f'role="img" aria-label="{label}"' in text
    assert page(figures()).text.count("sft: gradient norm") == 1
    plot = text.split('aria-label="harmlessness"')[1].split("</svg>")[0]
    assert (plot.count("<circle"), plot.count('class="whisker"')) == (3, 3)


def test_transcripts_stand_in_the_order_of_the_checkpoints_with_their_revisions():
    data = figures()
    answers = data["transcripts"][0]["responses"]
    data["transcripts"][0]["responses"] = dict(sorted(answers.items()))
    shown = page(data).text
    assert "start first words sft second words dpo third words" in shown
    assert "first answer draft answer round 1 · no-harm truncated a sharp critique revised answer" in shown


@pytest.mark.parametrize("part", [None, *figures()])
def test_any_part_may_be_missing(part: str | None, tmp_path: Path):
    data = {} if part is None else {key: value for key, value in figures().items() if key != part}
    assert Page(report.write(data, tmp_path).read_text("utf-8")).text.startswith("Charter report")


@pytest.mark.parametrize("part", figures())
def test_any_part_may_stand_alone_or_be_empty(part: str, tmp_path: Path):
    for value in (figures()[part], None, type(figures()[part])()):
        page({part: value})


def paths(value: Any, head: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*head, key), *paths(item, (*head, key)))]


NEEDED = {"round", "step", "low", "high", "count", "name"}
"""Keys that place a figure; a row without them says nothing."""


def test_any_single_value_may_be_null():
    for path in paths(figures()):
        if path[-1] in NEEDED or isinstance(path[-1], int):
            continue
        data = copy.deepcopy(figures())
        inner: Any = data
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = None
        page(data)
        del inner[path[-1]]
        page(data)


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path: Path):
    data = figures()
    data["training"]["sft"]["history"][1]["loss"] = float("nan")
    data["training"]["sft"]["history"][1]["grad_norm"] = float("inf")
    shown = Page(report.write(data, tmp_path).read_text("utf-8")).text
    stored = json.loads((tmp_path / "report.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert stored["training"]["sft"]["history"][1]["loss"] is None
    assert shown.count("1 of 2 values were not finite") == 2


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path):
    data = {"transcripts": [{"prompt": "half \ud83d of \ude00 a pair, \U0001f600 whole", "responses": {"start": "x"}}]}
    shown = Page(report.write(data, tmp_path).read_text("utf-8")).text
    assert "half \ufffd of \ufffd a pair, \U0001f600 whole" in shown


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        report.write(figures(), tmp_path / "file" / "run")


def test_the_data_are_left_as_they_were(tmp_path: Path):
    data = figures()
    report.write(data, tmp_path)
    assert data == figures()
