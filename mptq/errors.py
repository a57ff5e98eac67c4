"""Errors that a user can fix. Each message is one line: what is wrong, where, and what to do."""


class MptqError(Exception):
    """Base class: the input, the options or the machine does not allow the run. The CLI exits with `exit_code`."""

    exit_code = 1


class CheckpointError(MptqError):
    """The input is not a checkpoint that mptq can read, or it is damaged."""


class UnsupportedModelError(MptqError):
    """The model in the checkpoint has a feature that mptq does not support."""


class OptionError(MptqError):
    """An option has an invalid value."""

    exit_code = 2


class RecipeError(MptqError):
    """The recipe does not exist, is malformed, or cannot be applied to this model."""


class DataError(MptqError):
    """The calibration data or its tokenizer is missing, malformed, too small, or for a different vocabulary."""


class OutputError(MptqError):
    """The output cannot be written to the requested location."""


class StoppedError(MptqError):
    """The run was asked to stop and did so between two layers; it can be resumed."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class VerificationError(MptqError):
    """A written output does not match its manifest or its source checkpoint."""

    exit_code = 3


class GateError(MptqError):
    """The output was written, but its quality is outside the user's limits."""

    exit_code = 3
