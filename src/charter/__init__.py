"""One written constitution trains your language model and guards it."""

__version__ = "0.1.0"
