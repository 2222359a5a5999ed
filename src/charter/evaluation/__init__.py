"""Answers, scorers, metrics with intervals, and paired differences between two checkpoints."""

from __future__ import annotations

from charter.evaluation.metrics import (
    KINDS,
    METRICS,
    EvaluationConfig,
    Metric,
    compare,
    consistency,
    harmlessness,
    helpfulness,
    multiple_choice,
    multiple_choice_accuracy,
    over_refusal,
    read_comparisons,
    refusal,
    respond,
    score,
    summarise,
)
from charter.evaluation.scorers import (
    AIFeedbackScorer,
    KeywordScorer,
    LengthScorer,
    RewardScorer,
    Score,
    Scorer,
    is_refusal,
)

__all__ = [
    "KINDS",
    "METRICS",
    "AIFeedbackScorer",
    "EvaluationConfig",
    "KeywordScorer",
    "LengthScorer",
    "Metric",
    "RewardScorer",
    "Score",
    "Scorer",
    "compare",
    "consistency",
    "harmlessness",
    "helpfulness",
    "is_refusal",
    "multiple_choice",
    "multiple_choice_accuracy",
    "over_refusal",
    "read_comparisons",
    "refusal",
    "respond",
    "score",
    "summarise",
]
