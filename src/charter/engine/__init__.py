"""Text in, text or scores out: every engine keeps the interface of :mod:`charter.engine.base`."""

from charter.engine.base import Completion, Engine, Likelihood, LikelihoodEngine, Sampling, row_seed
from charter.engine.config import EngineConfig, engine_kind, load_engine

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "Likelihood",
    "LikelihoodEngine",
    "Sampling",
    "engine_kind",
    "load_engine",
    "row_seed",
]
