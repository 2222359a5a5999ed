"""The report of a run: ``report.json`` for programs and a self-contained ``report.html`` for people, same figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from charter import resources
from charter.train import plots
from charter.train.rundir import write_atomically

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
WEAK_AGREEMENT = 0.6
"""Agreement of the two orders below which the page says that the preferences mean little (two coins agree at 0.5)."""


def write(data: Mapping[str, Any], folder: Path) -> Path:
    """Write ``report.json`` and ``report.html``.

    Args:
        data: the figures, every part optional: ``charter``, ``model``, ``versions``, ``started``, ``seconds``,
            ``peak_memory`` (bytes), ``confidence`` (of the intervals, 0.95 where it is not given), ``checkpoints``
            (``name``, ``metrics`` and ``difference`` from the first one), ``revisions``, ``training``,
            ``preferences``, ``int8`` (log-probabilities in nats a token), ``stages``, ``transcripts``. A number that
            is not finite is written as ``null``.
        folder: where both are written, each whole or not at all; made where it does not exist.

    Returns:
        The path of ``report.html``.

    Raises:
        StorageError: the file system refused the write.
    """
    figures = _plain(data)
    page = render(figures)
    text = json.dumps(figures, ensure_ascii=False, allow_nan=False, indent=1, default=str)
    write_atomically(folder / "report.json", text + "\n")
    write_atomically(folder / "report.html", page)
    return folder / "report.html"


def render(data: Mapping[str, Any]) -> str:
    """The page as text; all text of models and prompts is escaped.

    Args:
        data: as for :func:`write`.
    """
    from markupsafe import Markup

    data = _plain(data)

    def safe(svg: str) -> Markup:
        return Markup(svg)  # noqa: S704 - made by charter.train.plots, which escapes names

    checkpoints: list[dict[str, Any]] = data.get("checkpoints") or []
    revisions = data.get("revisions") or {}
    preferences = data.get("preferences") or {}
    confidence = f"{100 * (data.get('confidence') or 0.95):.4g} %"
    headline, findings = _findings(checkpoints, confidence)
    names = _metric_names(checkpoints)
    histogram = [(item["low"], item["high"], item["count"]) for item in preferences.get("histogram") or ()]
    calibration = _calibration(preferences.get("calibration"))
    return str(
        _template().render(
            charter=data.get("charter") or {},
            **{key: data.get(key) for key in ("model", "started", "seconds", "peak_memory", "stages")},
            versions=data.get("versions") or {},
            revisions=revisions,
            preferences=preferences,
            checkpoints=[item["name"] for item in checkpoints],
            confidence=confidence,
            headline=headline,
            findings=findings,
            caution=_caution(data),
            metric_rows=[_metric_row(name, checkpoints) for name in names],
            difference_rows=_difference_rows(names, checkpoints),
            metric_plots=[
                {"title": _title(name), "note": MEANINGS.get(name, ""), "svg": safe(_metric_plot(name, checkpoints))}
                for name in names
                if "/" not in name and any(_value(item, name) is not None for item in checkpoints)
            ],
            curve=[
                {"round": point["round"], **_cell(point.get("harmlessness"))} for point in revisions.get("curve") or ()
            ],
            revision_plot=safe(_revision_plot(revisions.get("curve") or (), confidence)),
            preference_plot=safe(plots.bars(histogram, x="probability that A is better", y="pairs")),
            position_bias=_cell(preferences.get("position_bias"), sign=True),
            calibration=calibration,
            calibration_plot=safe(plots.lines(_calibration_series(calibration), x="predicted", y="observed")),
            training=_training(data.get("training") or {}),
            training_plots=[{**plot, "svg": safe(plot["svg"])} for plot in _training_plots(data.get("training") or {})],
            int8=_int8(data.get("int8") or {}),
            transcripts=[_transcript(item, [entry["name"] for entry in checkpoints]) for item in data["transcripts"]]
            if data.get("transcripts")
            else [],
        )
    )


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.ChainableUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment.from_string(resources.path("report.html.j2").read_text("utf-8"))


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: no number that is not finite, no half of a surrogate pair, keys as text."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def _number(value: Any, form: str = ".3f", unit: str = "") -> str:
    """A number in the given form, or a dash where there is none."""
    if form.endswith("d") and isinstance(value, float):
        value = round(value)
    return f"{value:{form}}{unit}" if isinstance(value, (int, float)) else "–"  # noqa: RUF001 - a dash, not a minus


def _title(name: str) -> str:
    return name.replace("_", " ")


def _metric_names(checkpoints: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {
        name
        for item in checkpoints
        for name, metric in (item.get("metrics") or {}).items()
        if metric and (metric.get("n") or metric.get("unscored"))
    }
    known = [name for name in MEANINGS if name in found]
    return known + sorted(found - set(known))


def _metric_row(name: str, checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    last = _difference(checkpoints[-1], name)
    return {
        "name": _title(name),
        "meaning": MEANINGS.get(name, ""),
        "cells": [_cell((item.get("metrics") or {}).get(name)) for item in checkpoints],
        "difference": _cell(last, sign=True),
        **_verdict(name, last),
    }


def _difference_rows(names: Sequence[str], checkpoints: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every checkpoint's differences from the first one; empty where the table shows them all already."""
    later = checkpoints[1:]
    if len(later) < 2 or not any(item.get("difference") for item in later):  # noqa: PLR2004 - one column would repeat
        return []
    return [
        {
            "name": _title(name),
            "cells": [
                {**_cell(_difference(item, name), sign=True), **_verdict(name, _difference(item, name))}
                for item in later
            ],
        }
        for name in names
    ]


def _difference(checkpoint: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (checkpoint.get("difference") or {}).get(name)
    return found


def _cell(metric: Mapping[str, Any] | None, *, sign: bool = False) -> dict[str, str]:
    """Value, interval and counts as text; what could not be scored is always said."""
    if not metric:
        return {"value": "–", "interval": "", "note": ""}  # noqa: RUF001 - a dash
    form = "+.3f" if sign else ".3f"
    low, high = metric.get("low"), metric.get("high")
    counts = [f"n {metric['n']}"] if metric.get("n") is not None else []
    if metric.get("unscored"):
        counts.append(f"{metric['unscored']} unscored")
    return {
        "value": _number(metric.get("value"), form),
        "interval": "" if low is None or high is None else f"{low:{form}} … {high:{form}}",
        "note": ", ".join(counts),
    }


def _clear(metric: Mapping[str, Any] | None) -> int:
    """1 or -1 where the interval lies on one side of 0, else 0."""
    if not metric or metric.get("low") is None or metric.get("high") is None:
        return 0
    return int(metric["low"] > 0) - int(metric["high"] < 0)


def _verdict(name: str, metric: Mapping[str, Any] | None) -> dict[str, str]:
    """The colour and the word of a difference; the word says what the colour says."""
    if not metric or metric.get("value") is None:
        return {"direction": "", "word": ""}
    moved = _clear(metric)
    if not moved:
        return {"direction": "", "word": "no clear change"}
    if name in NEUTRAL:
        return {"direction": "", "word": "rose" if moved > 0 else "fell"}
    better = moved * (-1 if name in LOWER_IS_BETTER else 1) > 0
    return {"direction": "up", "word": "better"} if better else {"direction": "down", "word": "worse"}


def _findings(checkpoints: Sequence[Mapping[str, Any]], confidence: str) -> tuple[str, list[str]]:
    """A headline and sentences in plain words; no change is claimed where the interval holds 0."""
    if not checkpoints or not checkpoints[-1].get("difference"):
        return "What this run measured", []
    sentences, moved = [], []
    for name in HEADLINE:
        metric = _difference(checkpoints[-1], name)
        unscored = f" {metric['unscored']} more could not be compared." if metric and metric.get("unscored") else ""
        if not metric or metric.get("value") is None:
            lack = f" {metric['unscored']} prompts lack a score." if unscored and metric else ""
            sentences.append(f"{name.capitalize()} could not be compared.{lack}")
            continue
        cell = _cell(metric, sign=True)
        span = f" ({confidence} interval {metric['low']:+.3f} to {metric['high']:+.3f})" if cell["interval"] else ""
        count = f" over {metric['n']} prompts" if metric.get("n") is not None else ""
        if direction := _clear(metric):
            word = "rose" if direction > 0 else "fell"
            moved.append(f"{name} {word}")
            sentences.append(f"{name.capitalize()} {word} by {abs(metric['value']):.3f}{span}{count}.{unscored}")
        else:
            sentences.append(f"{name.capitalize()}: no clear change, {cell['value']}{span}{count}.{unscored}")
    headline = " and ".join(moved) if moved else "no clear change in harmlessness or helpfulness"
    return f"From {checkpoints[0]['name']} to {checkpoints[-1]['name']}: {headline}", sentences


def _caution(data: Mapping[str, Any]) -> str:
    """What the figures themselves say about the feedback model."""
    preferences = data.get("preferences") or {}
    agreement = preferences.get("order_agreement")
    parts = []
    if preferences.get("pairs") and agreement is not None and agreement < WEAK_AGREEMENT:
        parts.append(
            f"The feedback model names the same answer in both orders in {100 * agreement:.0f} % of its "
            "judgements: its preferences say little. A stronger one can be set in feedback.engine."
        )
    if any("harmlessness" in (item.get("metrics") or {}) for item in data.get("checkpoints") or ()):
        parts.append("Harmlessness and helpfulness are scored by the feedback model, not by people.")
    return " ".join(parts)


def _value(item: Mapping[str, Any], name: str) -> float | None:
    metric = (item.get("metrics") or {}).get(name)
    return None if metric is None else metric.get("value")


def _metric_plot(name: str, checkpoints: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for item in checkpoints:
        metric = (item.get("metrics") or {}).get(name)
        if metric and metric.get("value") is not None:
            rows.append((item["name"], metric["value"], metric.get("low"), metric.get("high")))
    return plots.intervals(rows, x=_title(name))


def _revision_plot(curve: Sequence[Mapping[str, Any]], confidence: str) -> str:
    """Harmlessness by round, with the ends of its interval as two dashed lines where every round has them."""
    points = [
        (point["round"], point["harmlessness"])
        for point in curve
        if (point.get("harmlessness") or {}).get("value") is not None
    ]
    series = {"harmlessness": [(number, metric["value"]) for number, metric in points]}
    if all(metric.get("low") is not None and metric.get("high") is not None for _, metric in points):
        series[f"{confidence} low"] = [(number, metric["low"]) for number, metric in points]
        series[f"{confidence} high"] = [(number, metric["high"]) for number, metric in points]
    return plots.lines(series, x="round (0 is the first answer)", y="harmlessness")


def _calibration(value: Any) -> list[dict[str, Any]]:
    """Bins of ``predicted`` and ``observed`` share with a ``count``; anything else is left to ``report.json``."""
    if not isinstance(value, list):
        return []
    bins = [item for item in value if isinstance(item, Mapping)]
    return [
        {"count": None, **item}
        for item in bins
        if item.get("predicted") is not None and item.get("observed") is not None
    ]


def _calibration_series(bins: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    if not bins:
        return {}
    ends = [item["predicted"] for item in bins]
    return {
        "measured": [(item["predicted"], item["observed"]) for item in bins],
        "perfect": [(number, number) for number in sorted({min(ends), max(ends)})],
    }


def _training(training: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """A row a training stage: updates, first and last loss, tokens, time and memory."""
    rows = []
    for stage, given in training.items():
        entry = given or {}
        history = entry.get("history") or ()
        losses = [item["loss"] for item in history if item.get("loss") is not None]
        tokens, seconds = entry.get("tokens"), entry.get("seconds")
        rows.append(
            {
                "name": stage,
                "updates": max((item["step"] for item in history), default=None),
                "first": losses[0] if losses else None,
                "last": losses[-1] if losses else None,
                "rate": tokens / seconds if tokens and seconds else None,
                **{key: entry.get(key) for key in ("tokens", "seconds", "peak_memory")},
            }
        )
    return rows


def _training_plots(training: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, str]]:
    found = []
    for stage, given in training.items():
        entry = given or {}
        history = entry.get("history") or ()
        for column, title in (("reward", "reward"), ("loss", "loss"), ("grad_norm", "gradient norm")):
            points = [(item["step"], item[column]) for item in history if item.get(column) is not None]
            lost = sum(column in item and item[column] is None for item in history)
            svg = plots.lines({title: points}, x="update", y=title)
            note = f"{lost} of {lost + len(points)} values were not finite" if lost else ""
            if svg or note:
                found.append({"title": f"{stage}: {title}", "svg": svg, "note": note})
    return found


def _int8(entry: Mapping[str, Any]) -> dict[str, Any]:
    if not entry:
        return {}
    return {
        "reference": entry.get("fp32_logprob", entry.get("reference")),
        "quantised": entry.get("int8_logprob", entry.get("quantised")),
        "difference": entry.get("difference"),
        "tokens": entry.get("n", entry.get("tokens")),
    }


def _transcript(item: Mapping[str, Any], order: Sequence[str]) -> dict[str, Any]:
    """A transcript whose answers stand in the order of the checkpoints."""
    responses = item.get("responses") or {}
    names = [name for name in order if name in responses] + [name for name in responses if name not in order]
    return {**item, "responses": [(name, responses[name]) for name in names]}
