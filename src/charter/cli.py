"""The ``charter`` command.

Every verb takes ``--json``: one object on standard output, progress on standard error. Errors are one sentence on
standard error and a non-zero exit status; with ``--json`` they are an object as well.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from charter import __version__, constitution, document
from charter.errors import CharterError, RunError

app = typer.Typer(
    name="charter",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One written constitution trains your language model and guards it.",
)
err = Console(stderr=True)
out = Console()

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


@contextmanager
def _reported(as_json: bool) -> Iterator[None]:
    """Turn a :class:`CharterError` into its sentence and exit status."""
    try:
        yield
    except CharterError as error:
        if as_json:
            _print_json({"error": {"kind": type(error).__name__, "message": str(error)}})
        err.print(f"[bold red]error[/]: {_escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from error


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _print_json(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def _load_charter(path: Path | None) -> constitution.Charter:
    return constitution.load(path) if path else constitution.default()


def _version(value: bool) -> None:
    if value:
        out.print(f"charter {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Where to write charter.yaml and align.yaml.")] = Path(),
    as_json: JsonFlag = False,
) -> None:
    """Write a complete charter and a configuration to start from."""
    files = {"charter.yaml": constitution.default_text(), "align.yaml": "charter: charter.yaml\noutput: run\n"}
    with _reported(as_json):
        existing = [name for name in files if (folder / name).exists()]
        if existing:
            raise RunError(f"{folder / existing[0]} is there already.", fix="Remove it or choose another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    written = [str(folder / name) for name in files]
    if as_json:
        _print_json({"written": written})
    else:
        out.print(f"Wrote {' and '.join(written)}. Next: charter check {written[0]}")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="The charter file.")] = Path("charter.yaml"),
    as_json: JsonFlag = False,
) -> None:
    """Validate a charter; say the line, the key and the fix where it is wrong."""
    with _reported(as_json):
        charter = constitution.load(path)
    wordings = sum(len(item.critique_request) for item in charter.principles)
    if as_json:
        _print_json(
            {
                "name": charter.name,
                "digest": charter.digest,
                "principles": [item.id for item in charter.principles],
                "categories": [item.id for item in charter.categories],
                "wordings": wordings,
            }
        )
        return
    table = Table(title=f"{charter.name} · {charter.digest[:12]}", title_justify="left")
    for column in ("category", "threshold", "action", "MLCommons", "principles"):
        table.add_column(column)
    for item in charter.categories:
        action = f"{item.action} (always)" if item.always_block else item.action
        table.add_row(item.id, f"{item.threshold:.2f}", action, " ".join(item.mlcommons), " ".join(item.principles))
    out.print(table)
    out.print(f"{len(charter.principles)} principles, {wordings} critique wordings. The charter is valid.")


class _Console:
    """Draws the pipeline's progress on standard error, a line a stage."""

    def __init__(self) -> None:
        self._status = err.status("starting")
        self._name, self._rows, self._since = "", 0, time.monotonic()
        self._status.start()

    def stage_started(self, name: str, total: int) -> None:
        del total
        self._name, self._rows, self._since = name, 0, time.monotonic()
        self._status.update(f"{name} …")

    def advanced(self, rows: int) -> None:
        self._rows += rows
        self._status.update(f"{self._name}: {self._rows} rows, {time.monotonic() - self._since:.0f} s")

    def stage_finished(self, name: str, seconds: float, cached: bool) -> None:
        err.print(f"[green]✓[/] {name:<22} {'unchanged' if cached else f'{seconds:6.1f} s'}", highlight=False)

    def close(self) -> None:
        self._status.stop()


def _settings(config: Path | None) -> Any:
    """Settings from a file (paths in it are relative to it) or the defaults."""
    from charter.train import pipeline

    if config is None:
        return pipeline.AlignConfig()
    settings = document.build(pipeline.AlignConfig, document.read(config))
    return replace(settings, charter=config.parent / settings.charter) if settings.charter else settings


@contextmanager
def _listener() -> Iterator[_Console]:
    _quieten()
    listener = _Console()
    try:
        yield listener
    finally:
        listener.close()


def _quieten() -> None:
    """Progress is ours to draw; what libraries print besides is left to their loggers' errors."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)


@app.command()
def align(
    config: Annotated[Path | None, typer.Option("--config", help="Settings (YAML); defaults where absent.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run directory.")] = None,
    first: Annotated[str, typer.Option("--from", help="First stage that may run.")] = "sft",
    until: Annotated[str, typer.Option("--until", help="Last stage to run.")] = "grpo",
    report_to: Annotated[str | None, typer.Option("--report-to", help="tensorboard or wandb.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Align a model to a charter: all stages, resumable, ending with a report."""
    with _reported(as_json), _listener() as listener:
        from charter.train import pipeline

        settings = _settings(config)
        settings = replace(settings, output=output or settings.output, report_to=report_to or settings.report_to)
        for name in (first, until):
            if name not in pipeline.STAGES:
                raise RunError(f"There is no stage {name!r}.", fix=f"Use one of {', '.join(pipeline.STAGES)}.")
        charter = _load_charter(settings.charter)
        path = pipeline.align(settings, charter, first=first, until=until, listener=listener)  # type: ignore[arg-type]
    result = {"report": str(path), "model": str(settings.output / "model"), "charter": charter.digest}
    if as_json:
        _print_json(result)
    else:
        out.print(f"Aligned model: {result['model']}\nReport: {result['report']}", highlight=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="default, a folder, a GGUF file or a Hugging Face id.")] = "default",
    config: Annotated[Path | None, typer.Option("--config", help="Settings, as for align.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a model: harmlessness, helpfulness, consistency, refusals, multiple choice, with intervals."""
    with _reported(as_json), _listener() as listener:
        from charter.train import pipeline

        settings = replace(_settings(config), model=model)
        metrics = pipeline.Pipeline(settings, _load_charter(settings.charter), listener=listener).evaluate()
    if as_json:
        _print_json({"model": model, "metrics": {name: asdict(metric) for name, metric in metrics.items()}})
        return
    table = Table(title=model, title_justify="left")
    for column in ("metric", "value", "95 % interval", "n", "unscored"):
        table.add_column(column)
    for name, metric in metrics.items():
        value = "-" if metric.value is None else f"{metric.value:.3f}"
        interval = "" if metric.low is None else f"{metric.low:.3f} … {metric.high:.3f}"
        table.add_row(name, value, interval, str(metric.n), str(metric.unscored))
    out.print(table)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run directory.")] = Path("run"),
    as_json: JsonFlag = False,
) -> None:
    """Write report.html again from a run's report.json."""
    with _reported(as_json):
        from charter.train import report as reports

        source = run / "report.json"
        if not source.is_file():
            raise RunError(f"{run} has no report.json.", fix="Run `charter align` first.")
        try:
            data = json.loads(source.read_text("utf-8"))
        except ValueError as error:
            raise RunError(f"{source} is not valid JSON.", fix="Run `charter align` again.") from error
        path = reports.write(data, run)
    if as_json:
        _print_json({"report": str(path)})
    else:
        out.print(f"Report: {path}", highlight=False)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    stage: Annotated[str, typer.Argument(help="revisions, preferences, samples or evaluation.")],
    folder: Annotated[Path, typer.Argument(help="Where the data set is written.")],
    as_json: JsonFlag = False,
) -> None:
    """Write a stage's rows as a data set that TRL loads unchanged."""
    with _reported(as_json):
        from charter.train import exports

        rows = exports.export(run, stage, folder)
    if as_json:
        _print_json({"rows": rows, "folder": str(folder)})
    else:
        out.print(f"{rows} rows in {folder}", highlight=False)


def main() -> None:
    """Entry point of the ``charter`` command."""
    app()
