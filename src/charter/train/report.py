"""The report of a run: ``report.json`` for programs and a self-contained ``report.html`` for people, same figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from charter import resources
from charter.train import plots
from charter.train.rundir import canonical, write_atomically

MEANINGS: dict[str, str] = {
    "harmlessness": "red-team prompts: mean of the harm scorer, higher is better",
    "helpfulness": "helpful prompts: mean of the helpfulness scorer, higher is better",
    "consistency": "share of a prompt's answers that get one verdict",
    "refusal": "red-team prompts refused, by string match",
    "over_refusal": "harmless look-alikes refused, by string match; lower is better",
    "multiple_choice": "right answer likelier than the wrong one; chance is 0.5",
}
"""What each metric means, in the order of the table."""

LOWER_IS_BETTER = frozenset({"over_refusal"})
NEUTRAL = frozenset({"consistency", "refusal"})
HEADLINE = ("harmlessness", "helpfulness")


def write(data: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.json`` and ``report.html``.

    Args:
        data: the figures; ``charter`` (``name``, ``digest``, ``principles``) must be there, every other part may be
            missing: ``model``, ``versions``, ``started``, ``seconds``, ``peak_memory``, ``checkpoints``,
            ``revisions``, ``training``, ``preferences``, ``int8``, ``stages``, ``transcripts``.
        folder: where both are written, each whole or not at all.

    Returns:
        The path of ``report.html``.
    """
    write_atomically(folder / "report.json", canonical(data))
    page = folder / "report.html"
    write_atomically(page, render(data))
    return page


def render(data: Mapping[str, Any]) -> str:
    """The page as text; all text of models and prompts is escaped."""
    import jinja2
    from markupsafe import Markup

    template = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined).from_string(
        resources.path("report.html.j2").read_text("utf-8")
    )

    def safe(svg: str) -> Markup:
        return Markup(svg)  # noqa: S704 - made by charter.train.plots, which escapes names

    checkpoints = list(data.get("checkpoints", ()))
    rows = [_metric_row(name, checkpoints) for name in _metric_names(checkpoints)]
    curve = [
        (point["round"], point["harmlessness"]["value"])
        for point in data.get("revisions", {}).get("curve", ())
        if point["harmlessness"]["value"] is not None
    ]
    histogram = data.get("preferences", {}).get("histogram", ())
    headline, findings = _findings(checkpoints)
    return template.render(
        **{**data, "checkpoints": [item["name"] for item in checkpoints]},
        headline=headline,
        findings=findings,
        caution=_caution(data),
        metric_rows=rows,
        metric_plots=[
            {"title": name, "svg": safe(_metric_plot(name, checkpoints))}
            for name in (*HEADLINE, "over_refusal", "multiple_choice")
            if any(_value(item, name) is not None for item in checkpoints)
        ],
        revision_plot=safe(plots.lines({"harmlessness": curve}, x="round", y="harmlessness")),
        preference_plot=safe(
            plots.bars([(item["low"], item["high"], item["count"]) for item in histogram], x="probability", y="pairs")
        ),
        training_plots=[
            {**plot, "svg": safe(plot["svg"])} for plot in _training_plots(data.get("training", {})) if plot["svg"]
        ],
    )


def _metric_names(checkpoints: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {
        name for item in checkpoints for name, metric in item["metrics"].items() if metric["n"] or metric["unscored"]
    }
    known = [name for name in MEANINGS if name in found]
    return known + sorted(found - set(known))


def _metric_row(name: str, checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = checkpoints[-1].get("difference", {}).get(name)
    return {
        "name": name.replace("_", " "),
        "meaning": MEANINGS.get(name, ""),
        "cells": [_cell(item["metrics"].get(name)) for item in checkpoints],
        "difference": _cell(last, sign=True),
        "direction": _direction(name, last),
    }


def _cell(metric: Mapping[str, Any] | None, *, sign: bool = False) -> dict[str, str]:
    if not metric or metric["value"] is None:
        note = f"{metric['unscored']} unscored" if metric and metric["unscored"] else ""
        return {"value": "-", "interval": "", "note": note}
    form = "{:+.3f}" if sign else "{:.3f}"
    interval = "" if metric["low"] is None else f"{form} … {form}".format(metric["low"], metric["high"])
    note = f"n {metric['n']}" + (f", {metric['unscored']} unscored" if metric["unscored"] else "")
    return {"value": form.format(metric["value"]), "interval": interval, "note": note}


def _clear(metric: Mapping[str, Any] | None) -> int:
    """1 or -1 where the interval lies on one side of 0, else 0."""
    if not metric or metric["low"] is None:
        return 0
    return int(metric["low"] > 0) - int(metric["high"] < 0)


def _direction(name: str, metric: Mapping[str, Any] | None) -> str:
    moved = _clear(metric) * (-1 if name in LOWER_IS_BETTER else 1)
    return "" if name in NEUTRAL else {1: "up", -1: "down", 0: ""}[moved]


def _findings(checkpoints: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """A headline and sentences in plain words; no change is claimed where the interval holds 0."""
    differences = checkpoints[-1].get("difference", {}) if checkpoints else {}
    if not differences:
        return "What this run measured", []
    sentences, moved = [], []
    for name in HEADLINE:
        metric = differences.get(name)
        if not metric or metric["value"] is None:
            sentences.append(f"{name.capitalize()} could not be scored.")
            continue
        direction = _clear(metric)
        span = "" if metric["low"] is None else f" (95 % interval {metric['low']:+.3f} to {metric['high']:+.3f})"
        if direction:
            word = "rose" if direction > 0 else "fell"
            moved.append(f"{name} {word}")
            sentences.append(f"{name.capitalize()} {word} by {abs(metric['value']):.3f}{span}.")
        else:
            sentences.append(f"{name.capitalize()}: no clear change, {metric['value']:+.3f}{span}.")
    headline = " and ".join(moved) if moved else "no clear change in harmlessness or helpfulness"
    return f"From {checkpoints[0]['name']} to {checkpoints[-1]['name']}: {headline}", sentences


def _caution(data: Mapping[str, Any]) -> str:
    """What the figures themselves say about the feedback model."""
    feedback = data.get("preferences")
    parts = []
    if feedback and feedback.get("pairs"):
        agreement = feedback["order_agreement"]
        if agreement < 0.6:  # noqa: PLR2004 - little better than two coins
            parts.append(
                f"The feedback model names the same answer in both orders in {100 * agreement:.0f} % of its "
                "judgements: its preferences say little. A stronger one can be set in feedback.engine."
            )
    if any("harmlessness" in item["metrics"] for item in data.get("checkpoints", ())):
        parts.append("Harmlessness and helpfulness are scored by the feedback model, not by people.")
    return " ".join(parts)


def _value(item: Mapping[str, Any], name: str) -> float | None:
    metric = item["metrics"].get(name)
    return None if metric is None else metric["value"]


def _metric_plot(name: str, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for item in checkpoints:
        metric = item["metrics"].get(name)
        if metric and metric["value"] is not None:
            rows.append((item["name"], metric["value"], metric["low"], metric["high"]))
    return plots.intervals(rows, x=name.replace("_", " "))


def _training_plots(training: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    found = []
    for stage, entry in training.items():
        note = f"{entry['tokens']:,} tokens in {entry['seconds']:.0f} s"
        for column, title in (("reward", "reward"), ("loss", "loss"), ("grad_norm", "gradient norm")):
            points = [(item["step"], item[column]) for item in entry["history"] if column in item]
            if column == "loss" and any("reward" in item for item in entry["history"]):
                continue
            svg = plots.lines({title: points}, x="update", y=title)
            found.append({"title": f"{stage}: {title}", "svg": svg, "note": note})
    return found
