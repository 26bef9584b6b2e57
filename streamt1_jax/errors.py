"""The errors a user can meet, each with the exit code of the command line.

A message has three parts: what came, what was expected, what to do.
"""


class StreamT1Error(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class BadInputError(StreamT1Error, ValueError):
    """A prompt, a setting, a size, a length, a seed or a path that cannot be used."""

    exit_code = 2


class WeightsError(StreamT1Error):
    """Weights that are missing, broken, of the wrong shape or not the ones expected."""

    exit_code = 3


class OutOfMemoryError(StreamT1Error):
    """The device has too little memory for the configuration."""

    exit_code = 4


class TrainingError(StreamT1Error):
    """A training that has diverged."""


class RewardError(StreamT1Error):
    """A reward model failed, or no candidate of a chunk has a finite score."""
