"""Errors that a user can cause. A message names what is wrong, where, what was found, and the cure."""

__all__ = ["ConfigError", "DataError", "ModelError", "RLHFError", "SourceError", "StageError", "TrainingError"]


class RLHFError(Exception):
    """Base of every error that a user can cause and fix; the command line prints it without a traceback."""


class ConfigError(RLHFError):
    """A key or value in params.yaml, a preset or an override is wrong."""


class DataError(RLHFError):
    """Rows are missing, malformed, or too few to go on with."""


class SourceError(RLHFError):
    """A data or model source cannot be reached, or is not what its checksum promises."""


class ModelError(RLHFError):
    """A model folder is incomplete or does not fit the stage that reads it."""


class TrainingError(RLHFError):
    """Training cannot go on: a quantity is not finite, or the policy has left the region where updates make sense."""


class StageError(RLHFError):
    """A stage failed, or dvc.yaml and the code disagree about it."""
