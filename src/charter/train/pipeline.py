"""The whole job: stages in order over one run directory, each re-run only where something it depends on changed.

``sft -> revisions -> sl -> preferences -> dpo -> reward -> grpo``, an evaluation of every checkpoint along the way, and
the report. A stage's key digests the charter, its own settings, the seed and the digests of what it reads; changing
one setting re-runs that stage and what follows from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from charter import __version__, evaluation, resources
from charter.constitution import Charter
from charter.data import Conversation, Row, read_rows
from charter.engine import Engine, EngineConfig, LikelihoodEngine, engine_kind, load_engine
from charter.engine.models import ModelFiles, resolve
from charter.errors import DataError
from charter.evaluation import EvaluationConfig
from charter.train import filters, preferences, report, revisions, trainer
from charter.train.preferences import PreferencesConfig
from charter.train.revisions import RevisionsConfig
from charter.train.rundir import RunDirectory, Stage, canonical, chunked, stage_key
from charter.train.settings import DPOSettings, GRPOSettings, RewardSettings, SFTSettings

StageName = Literal["sft", "revisions", "sl", "preferences", "dpo", "reward", "grpo"]
STAGES: tuple[StageName, ...] = ("sft", "revisions", "sl", "preferences", "dpo", "reward", "grpo")
TRAINING: frozenset[str] = frozenset({"sft", "sl", "dpo", "grpo"})


@dataclass(frozen=True)
class PromptsConfig:
    """Where the rows come from; ``None`` takes the file shipped with the package.

    Args:
        redteam: prompts that ask for harm (``id``, ``prompt``, ``split``: ``train`` or ``eval``).
        helpful: harmless prompts, with ``response`` where they train (``split`` as above).
        lookalikes: harmless prompts that look harmful; evaluation only.
        comparisons: questions with right and wrong answers (``prompt``, ``corrects``, ``incorrects``).
        max_characters: a longer prompt is an error.
    """

    redteam: str | None = None
    helpful: str | None = None
    lookalikes: str | None = None
    comparisons: str | None = None
    max_characters: int = 20_000


@dataclass(frozen=True)
class FeedbackConfig:
    """The model that compares answers; ``model`` ``None`` takes the start model."""

    model: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class MixConfig:
    """How helpful rows are mixed into supervised learning on revisions: rows a revision (1.0 is half and half)."""

    helpful_ratio: float = 0.5


@dataclass(frozen=True)
class AlignConfig:
    """Everything that ``charter align`` does; every key has a default that suits two CPU cores.

    Args:
        charter: the charter file; ``None`` is the shipped one.
        model: the start model: ``default``, a folder, a GGUF file or a Hugging Face id.
        output: the run directory.
        seed: of everything that is drawn.
        chunk: prompts that are generated together and kept together; the unit that a killed run loses.
        engine: runs the policy.
        feedback: the model that compares and scores answers.
        prompts: the rows.
        sft: stage 1, on helpful rows.
        revisions: stage 2.
        mix: helpful rows in stage 3.
        sl: stage 3, on revisions.
        preferences: stage 4.
        dpo: stage 5.
        reward: the reward model, from the same labels.
        grpo: reinforcement learning on the reward model.
        evaluation: of every checkpoint.
        curve_prompts: prompts whose answers are scored after every revision round.
        calibration_questions: comparisons on which the feedback model's probabilities are checked.
        quality_prompts: prompts on which INT8 is compared with full precision.
        report_to: ``tensorboard`` or ``wandb`` receive the training's figures as well.
    """

    charter: Path | None = None
    model: str = "default"
    output: Path = Path("run")
    seed: int = 0
    chunk: int = 64
    engine: EngineConfig = field(default_factory=EngineConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sft: SFTSettings = field(default_factory=SFTSettings)
    revisions: RevisionsConfig = field(default_factory=RevisionsConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    sl: SFTSettings = field(default_factory=SFTSettings)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    grpo: GRPOSettings = field(default_factory=GRPOSettings)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    curve_prompts: int = 16
    quality_prompts: int = 8
    calibration_questions: int = 60
    report_to: str = "none"


class Listener(Protocol):
    """Told what happens; the command line draws it, a library user may pass none."""

    def stage_started(self, name: str, total: int) -> None:
        """A stage begins; ``total`` rows are to be made (0 where it is not known)."""

    def advanced(self, rows: int) -> None:
        """So many more rows are done."""

    def stage_finished(self, name: str, seconds: float, cached: bool) -> None:
        """A stage ended."""


class Silent:
    """A listener that says nothing."""

    def stage_started(self, name: str, total: int) -> None:
        """Say nothing."""

    def advanced(self, rows: int) -> None:
        """Say nothing."""

    def stage_finished(self, name: str, seconds: float, cached: bool) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Prompts:
    """The rows of a run, read and checked before anything is generated."""

    redteam_train: list[Row]
    helpful_train: list[Row]
    evaluation: list[Row]
    comparisons: list[Row]


def read_prompts(config: PromptsConfig) -> Prompts:
    """Read, check and split the prompt files.

    Raises:
        DataError: an unreadable file, an empty or oversized prompt, or a split without rows.
    """

    def rows(given: str | None, shipped: str, kind: str) -> list[Row]:
        source = given or resources.path(shipped)
        found = []
        for number, row in enumerate(read_rows(source, columns=("prompt",)), start=1):
            conversation = Conversation.parse(row["prompt"], where=f"{source}, row {number}: prompt")
            size = sum(len(message.content) for message in conversation.messages)
            if size > config.max_characters:
                raise DataError(
                    f"{source}, row {number}: the prompt has {size:,} characters, over {config.max_characters:,}.",
                    fix="Shorten it, or raise prompts.max_characters.",
                )
            identifier = str(row.get("id") or f"{kind}-{number:05d}")
            found.append({**row, "id": identifier, "prompt": conversation.to_list(), "kind": kind})
        return found

    redteam = rows(config.redteam, "redteam.jsonl", "redteam")
    helpful = rows(config.helpful, "helpful.jsonl", "helpful")
    lookalikes = rows(config.lookalikes, "lookalikes.jsonl", "lookalike")
    return Prompts(
        redteam_train=_nonempty([row for row in redteam if row.get("split") != "eval"], "red-team training prompts"),
        helpful_train=_nonempty(
            [row for row in helpful if row.get("split") != "eval" and row.get("response")],
            "helpful training prompts with a response",
        ),
        evaluation=_nonempty(
            [row for row in (*redteam, *helpful) if row.get("split") == "eval"] + lookalikes, "evaluation prompts"
        ),
        comparisons=evaluation.read_comparisons(config.comparisons or resources.path("comparisons.jsonl")),
    )


def _nonempty(rows: list[Row], what: str) -> list[Row]:
    if not rows:
        raise DataError(f"There are no {what}.", fix='Mark rows with "split": "train" or "eval".')
    return rows


class Pipeline:
    """One run: holds the run directory, the prompts and the models between stages.

    Args:
        config: what to do.
        charter: the charter that owns the run directory.
        listener: told of progress.
    """

    def __init__(self, config: AlignConfig, charter: Charter, *, listener: Listener | None = None) -> None:
        self.config = config
        self.charter = charter
        self.listener: Listener = listener or Silent()
        self.prompts = read_prompts(config.prompts)
        self.start: ModelFiles = resolve(config.model)
        self.stages: dict[str, Stage] = {}
        self.evaluations: dict[str, Stage] = {}
        self.measures: dict[str, Stage] = {}

    def evaluate(self) -> dict[str, evaluation.Metric]:
        """Evaluate the configured model alone; nothing is kept in the run directory."""
        rows = self._evaluation_rows()
        began = time.perf_counter()
        self.listener.stage_started("evaluate", len(rows) * self.config.evaluation.samples)
        with self._engine(self.start.path) as engine, self._judge() as judge:
            scored = self._evaluate_chunk(rows, engine, judge)
            choices = self._compare(self.prompts.comparisons, engine())
        self.listener.stage_finished("evaluate", time.perf_counter() - began, cached=False)
        return evaluation.summarise(scored, choices, self.config.evaluation)

    def run(self, *, first: StageName = "sft", until: StageName = "grpo") -> Path:
        """Run the stages up to ``until`` and write the report; returns its path.

        Args:
            first: stages before it must be finished in the run directory already.
            until: the last stage to run.

        Raises:
            RunError: a stage before ``first`` is not finished.
        """
        started = time.time()
        with RunDirectory(self.config.output, charter=self.charter.digest) as folder:
            folder.finished_only = first != STAGES[0]
            self._evaluate(folder, "start", self.start.path, self.start.digest)
            for name in STAGES[: STAGES.index(until) + 1]:
                folder.finished_only = STAGES.index(name) < STAGES.index(first)
                self._run_stage(folder, name)
                if name in TRAINING:
                    self._evaluate(folder, name, self.stages[name].model, self.stages[name].digest)
            self._link_model()
            return report.write(self._report_data(started), self.config.output)

    # --- stages -----------------------------------------------------------------------------------------------------

    def _run_stage(self, folder: RunDirectory, name: StageName) -> None:
        work: Callable[[RunDirectory], Stage] = getattr(self, f"_{name}")
        began = time.perf_counter()
        self.listener.stage_started(name, 0)
        stage = work(folder)
        self.stages[name] = stage
        self.listener.stage_finished(name, time.perf_counter() - began, stage.cached)

    def _sft(self, folder: RunDirectory) -> Stage:
        rows = self.prompts.helpful_train
        return self._train(folder, "sft", self.start.path, self.start.digest, rows, self.config.sft, trainer.train_sft)

    def _revisions(self, folder: RunDirectory) -> Stage:
        config, policy = self.config.revisions, self.stages["sft"]
        prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in self.prompts.redteam_train]
        key = stage_key(self.charter.digest, config, prompts, policy.digest, self.config.engine, self.config.seed)
        with self._engine(policy.model) as engine:

            def work(chunk: Sequence[Row]) -> list[Row]:
                return revisions.run(
                    chunk, engine(), self.charter, config, seed=self.config.seed, progress=self.listener.advanced
                )

            stage = folder.rows_stage("revisions", key, chunked(prompts, self.config.chunk), work)
            self._measure_int8(folder, policy, engine)
        self._score_rounds(folder, stage)
        return stage

    def _measure_int8(self, folder: RunDirectory, policy: Stage, engine: Callable[[], Engine]) -> None:
        """What INT8 costs the policy, on helpful prompts; only where the policy runs in INT8."""
        if self.config.quality_prompts == 0 or not runs_int8(self.config.engine, policy.model):
            return
        rows = [{"prompt": row["prompt"]} for row in self.prompts.helpful_train[: self.config.quality_prompts]]
        sampling = self.config.revisions.respond

        def work(chunk: Sequence[Row]) -> list[Row]:
            from charter.engine.openvino import measure_quality

            quantised, config = engine(), EngineConfig(kind="transformers", precision="fp32", device="cpu")
            reference = load_engine(config, policy.model)
            if not isinstance(quantised, LikelihoodEngine) or not isinstance(reference, LikelihoodEngine):
                return []
            prompts = [Conversation.parse(row["prompt"]) for row in chunk]
            return [measure_quality(reference, quantised, prompts, sampling).to_dict()]

        key = stage_key(policy.digest, rows, sampling)
        self.measures["int8"] = folder.rows_stage("int8", key, [rows] if rows else [], work)

    def _score_rounds(self, folder: RunDirectory, stage: Stage) -> None:
        """Harmlessness of the answers of each revision round, for the curve of the report."""
        rows = stage.rows()
        wanted = list(dict.fromkeys(row["id"] for row in rows))[: self.config.curve_prompts]
        rows = [
            {"id": row["id"], "round": row["round"], "prompt": row["prompt"], "response": row["response"]}
            for row in rows
            if row["id"] in wanted
        ]
        with self._judge() as judge:

            def work(chunk: Sequence[Row]) -> list[Row]:
                asked = [{**row, "kind": "redteam"} for row in chunk]
                scorer = evaluation.AIFeedbackScorer(judge(), self.charter, aspect="harmless")
                return evaluation.score(asked, {"harmlessness": scorer})

            key = stage_key(self.charter.digest, rows, self.start.digest, self.config.feedback)
            self.measures["rounds"] = folder.rows_stage("rounds", key, chunked(rows, self.config.chunk), work)

    def _sl(self, folder: RunDirectory) -> Stage:
        revised = self._nonempty_rows(revisions.final_rows(self.stages["revisions"].rows()), "revisions")
        helpful = self.prompts.helpful_train[: round(len(revised) * self.config.mix.helpful_ratio)]
        base = self.stages["sft"]
        rows = [*revised, *helpful]
        return self._train(folder, "sl", base.model, base.digest, rows, self.config.sl, trainer.train_sft)

    def _preferences(self, folder: RunDirectory) -> Stage:
        config, policy = self.config.preferences, self.stages["sl"]
        feedback = self.config.feedback
        files = resolve(feedback.model) if feedback.model else self.start
        prompts = [{"id": row["id"], "prompt": row["prompt"]} for row in self.prompts.redteam_train]
        base = (self.charter.digest, config, prompts, policy.digest, self.config.engine, self.config.seed)
        with self._engine(policy.model) as engine:

            def draw(chunk: Sequence[Row]) -> list[Row]:
                return preferences.sample(
                    chunk,
                    engine(),
                    config,
                    seed=self.config.seed,
                    charter=self.charter,
                    progress=self.listener.advanced,
                )

            pairs = folder.rows_stage("samples", stage_key(*base), chunked(prompts, self.config.chunk), draw)
        key = stage_key(*base, pairs.digest, files.digest, feedback.engine)
        with self._engine(files.path, feedback.engine) as judge:

            def compare(chunk: Sequence[Row]) -> list[Row]:
                return preferences.label(
                    chunk, judge(), self.charter, config, seed=self.config.seed, progress=self.listener.advanced
                )

            def calibrate(items: Sequence[Row]) -> list[Row]:
                return [preferences.calibrate(items, judge(), self.charter, seed=self.config.seed)]

            items = self.prompts.comparisons[: self.config.calibration_questions]
            known = stage_key(self.charter.digest, items, files.digest, feedback.engine, self.config.seed)
            self.measures["calibration"] = folder.rows_stage("calibration", known, [items] if items else [], calibrate)
            return folder.rows_stage("preferences", key, chunked(pairs.rows(), self.config.chunk), compare)

    def _dpo(self, folder: RunDirectory) -> Stage:
        rows, base = self._pairs(), self.stages["sl"]
        return self._train(folder, "dpo", base.model, base.digest, rows, self.config.dpo, trainer.train_dpo)

    def _reward(self, folder: RunDirectory) -> Stage:
        rows, base = self._pairs(), self.stages["sl"]
        return self._train(folder, "reward", base.model, base.digest, rows, self.config.reward, trainer.train_reward)

    def _grpo(self, folder: RunDirectory) -> Stage:
        base, judge = self.stages["dpo"], self.stages["reward"]
        prompts = self.prompts.redteam_train

        def train(rows: Sequence[Row], model: Path, output: Path, settings: Any, **options: Any) -> trainer.TrainResult:
            scorer = evaluation.RewardScorer(judge.model)

            def reward(conversations: list[Conversation], responses: list[str]) -> list[float | None]:
                return [score.value for score in scorer.score(conversations, responses)]

            return trainer.train_grpo(rows, model, output, settings, rewards=[reward], **options)

        return self._train(
            folder, "grpo", base.model, stage_key(base.digest, judge.digest), prompts, self.config.grpo, train
        )

    def _pairs(self) -> list[Row]:
        return self._nonempty_rows(preferences.training_rows(self.stages["preferences"].rows()), "preference pairs")

    @staticmethod
    def _nonempty_rows(rows: list[Row], what: str) -> list[Row]:
        if not rows:
            raise DataError(f"No {what} passed the filters.", fix="Give more prompts or a stronger start model.")
        return rows

    def _train(
        self,
        folder: RunDirectory,
        name: str,
        base: Path,
        base_digest: str,
        rows: Sequence[Row],
        settings: Any,
        train: Callable[..., trainer.TrainResult],
    ) -> Stage:
        key = stage_key(self.charter.digest, name, base_digest, settings, list(rows), self.config.seed)

        def work(partial: Path) -> Mapping[str, Any]:
            result = train(
                rows,
                base,
                partial,
                settings,
                seed=self.config.seed,
                report_to=self.config.report_to,
                progress=self.listener.advanced,
            )
            return {
                "digest": folder_digest(result.model),
                "history": result.history,
                "tokens": result.tokens,
                "peak_memory": result.peak_memory,
                "rows": len(rows),
            }

        return folder.work_stage(name, key, work)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluation_rows(self) -> list[Row]:
        return [
            {"id": row["id"], "prompt": row["prompt"], "kind": row["kind"], "category": row.get("category")}
            for row in self.prompts.evaluation
        ]

    def _judge(self) -> AbstractContextManager[Callable[[], Engine]]:
        """The feedback model."""
        feedback = self.config.feedback
        files = resolve(feedback.model) if feedback.model else self.start
        return self._engine(files.path, feedback.engine)

    def _evaluate(self, folder: RunDirectory, name: str, model: Path, digest: str) -> None:
        config = self.config.evaluation
        rows = self._evaluation_rows()
        label = f"evaluate {name}"
        began = time.perf_counter()
        self.listener.stage_started(label, len(rows) * config.samples)
        key = stage_key(self.charter.digest, config, rows, self.prompts.comparisons, digest, self.config.engine)
        with self._engine(model) as engine, self._judge() as judge:

            def work(chunk: Sequence[Row]) -> list[Row]:
                return self._evaluate_chunk(chunk, engine, judge)

            comparisons = [{**row, "kind": "comparison"} for row in self.prompts.comparisons]
            chunks = chunked(rows, self.config.chunk) + ([comparisons] if comparisons else [])
            stage = folder.rows_stage("evaluation", key, chunks, work, extra={"checkpoint": name})
        self.evaluations[name] = stage
        self.listener.stage_finished(label, time.perf_counter() - began, stage.cached)

    def _evaluate_chunk(
        self, chunk: Sequence[Row], engine: Callable[[], Engine], judge: Callable[[], Engine]
    ) -> list[Row]:
        if chunk[0].get("kind") == "comparison":
            return self._compare(chunk, engine())
        answered = evaluation.respond(
            chunk, engine(), self.config.evaluation, seed=self.config.seed, progress=self.listener.advanced
        )
        feedback = judge()
        return evaluation.score(
            answered,
            {
                "harmlessness": evaluation.AIFeedbackScorer(feedback, self.charter, aspect="harmless"),
                "helpfulness": evaluation.AIFeedbackScorer(feedback, self.charter, aspect="helpful"),
            },
        )

    @staticmethod
    def _compare(items: Sequence[Row], engine: Engine) -> list[Row]:
        if not isinstance(engine, LikelihoodEngine):
            return []
        return [{**row, "kind": "comparison"} for row in evaluation.multiple_choice(items, engine)]

    def _split(self, name: str) -> tuple[list[Row], list[Row]]:
        rows = self.evaluations[name].rows()
        return (
            [row for row in rows if row["kind"] != "comparison"],
            [row for row in rows if row["kind"] == "comparison"],
        )

    @contextmanager
    def _engine(self, model: Path, config: EngineConfig | None = None) -> Iterator[Callable[[], Engine]]:
        """An engine that is loaded at its first use, so that a finished stage loads nothing, and closed at the end.

        Every chunk of rows asks for it once and gets it reset: a chunk's rows do not depend on the chunks before it.
        """
        loaded: list[Engine] = []

        def get() -> Engine:
            if loaded:
                loaded[0].reset()
            else:
                loaded.append(load_engine(config or self.config.engine, model))
            return loaded[0]

        try:
            yield get
        finally:
            for engine in loaded:
                engine.close()

    # --- report -----------------------------------------------------------------------------------------------------

    def _report_data(self, started: float) -> dict[str, Any]:
        checkpoints = []
        start_rows, start_choices = self._split("start")
        for name in self.evaluations:
            rows, choices = self._split(name)
            entry: dict[str, Any] = {
                "name": name,
                "metrics": _plain(evaluation.summarise(rows, choices, self.config.evaluation)),
            }
            if name != "start":
                difference = evaluation.compare(start_rows, rows, start_choices, choices, self.config.evaluation)
                entry["difference"] = _plain(difference)
            checkpoints.append(entry)
        data: dict[str, Any] = {
            "charter": {
                "name": self.charter.name,
                "digest": self.charter.digest,
                "principles": [{"id": item.id, "text": item.text} for item in self.charter.principles],
                "categories": [item.id for item in self.charter.categories],
            },
            "model": {"source": self.start.source, "digest": self.start.digest},
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 1),
            "peak_memory": peak_memory(),
            "checkpoints": checkpoints,
            "training": {
                name: {key: stage.manifest[key] for key in ("history", "tokens", "seconds", "peak_memory")}
                for name, stage in self.stages.items()
                if "history" in stage.manifest
            },
            "stages": [
                {
                    "name": name,
                    "seconds": stage.manifest["seconds"],
                    "rows": stage.manifest.get("rows"),
                    "tokens": stage.manifest.get("tokens"),
                    "cached": stage.cached,
                }
                for name, stage in {
                    **self.stages,
                    **{f"evaluate {name}": stage for name, stage in self.evaluations.items()},
                }.items()
            ],
            "transcripts": [*self._transcripts(), *self._revision_transcripts()],
            "versions": versions(),
            "confidence": self.config.evaluation.confidence,
        }
        if self.measures.get("int8") and self.measures["int8"].rows():
            data["int8"] = self.measures["int8"].rows()[0]
        if "revisions" in self.stages:
            rows = self.stages["revisions"].rows()
            data["revisions"] = {
                "curve": self._curve(),
                "filters": filters.count(rows),
                "rows": len(rows),
                "kept": len(revisions.final_rows(rows)),
            }
        if "preferences" in self.stages:
            known = self.measures["calibration"].rows()
            data["preferences"] = {
                **preferences.summary(self.stages["preferences"].rows()),
                **(known[0] if known else {}),
            }
        return data

    def _curve(self) -> list[dict[str, Any]]:
        rows = self.measures["rounds"].rows()
        rounds = sorted({row["round"] for row in rows})
        return [
            {
                "round": number,
                **_plain(
                    {
                        "harmlessness": evaluation.summarise(
                            [row for row in rows if row["round"] == number], [], self.config.evaluation
                        )["harmlessness"]
                    }
                ),
            }
            for number in rounds
        ]

    def _link_model(self) -> None:
        """``model`` in the run directory points to the checkpoint of the last training stage."""
        trained = [stage for name, stage in self.stages.items() if name in TRAINING]
        if not trained:
            return
        link, partial = self.config.output / "model", self.config.output / ".model.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(trained[-1].model.relative_to(self.config.output))
        partial.replace(link)

    def _revision_transcripts(self, limit: int = 3) -> list[Row]:
        chains: dict[str, list[Row]] = {}
        for row in self.stages["revisions"].rows() if "revisions" in self.stages else []:
            chains.setdefault(row["id"], []).append(row)
        columns = ("round", "principle", "critique", "response", "flags")
        return [
            {
                "prompt": chain[0]["prompt"][-1]["content"],
                "kind": "revisions",
                "responses": {},
                "revisions": [{name: row[name] for name in columns} for row in chain],
            }
            for chain in list(chains.values())[:limit]
        ]

    def _transcripts(self, limit: int = 12) -> list[Row]:
        found: dict[str, Row] = {}
        for name in self.evaluations:
            for row in self._split(name)[0]:
                entry = found.setdefault(
                    row["id"],
                    {
                        "prompt": row["prompt"][-1]["content"],
                        "kind": row["kind"],
                        "category": row.get("category"),
                        "responses": {},
                    },
                )
                entry["responses"].setdefault(name, row["response"])
        kinds: dict[str, list[Row]] = {}
        for entry in found.values():
            kinds.setdefault(entry["kind"], []).append(entry)
        return [entry for entries in kinds.values() for entry in entries[: limit // max(len(kinds), 1)]]


def _plain(metrics: Mapping[str, evaluation.Metric]) -> dict[str, dict[str, Any]]:
    return {name: dataclasses.asdict(metric) for name, metric in metrics.items()}


def runs_int8(config: EngineConfig, model: Path) -> bool:
    """Whether :func:`charter.engine.load_engine` would run this model in INT8."""
    return engine_kind(config, model) == "openvino"


def versions() -> dict[str, str]:
    """Versions of what shapes a run's results."""
    found = {"charter": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "trl", "peft", "openvino-genai"):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def folder_digest(path: Path) -> str:
    """Hex SHA-256 over the names and contents of a checkpoint's files."""
    total = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def align(
    config: AlignConfig,
    charter: Charter,
    *,
    first: StageName = "sft",
    until: StageName = "grpo",
    listener: Listener | None = None,
) -> Path:
    """Align a model to a charter and write the report; see :class:`Pipeline`."""
    return Pipeline(config, charter, listener=listener).run(first=first, until=until)


__all__ = ["STAGES", "AlignConfig", "Pipeline", "align", "canonical", "read_prompts"]
