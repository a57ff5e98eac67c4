"""The errors that a user can mend: each message is one line saying what is wrong, where, and what to do."""


class MptqError(Exception):
    """Something in the input, the options or the machine stops the run; the command line exits with `exit_code`."""

    exit_code = 1


class CheckpointError(MptqError):
    """The input is no checkpoint that mptq reads, or it is damaged."""


class UnsupportedModelError(MptqError):
    """The checkpoint holds a model with a feature that mptq does not quantize."""


class OptionError(MptqError):
    """An option has a value that it cannot have."""

    exit_code = 2


class RecipeError(MptqError):
    """The recipe does not exist, is malformed, or cannot be applied to this model."""


class DataError(MptqError):
    """The calibration data or its tokenizer does not exist, is malformed, too little, or made for another vocabulary."""


class OutputError(MptqError):
    """The output cannot be written where it was asked for."""


class StoppedError(MptqError):
    """The run was asked to stop, and did so between two layers: it can go on."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class VerificationError(MptqError):
    """A written output is not what its manifest or its source says."""

    exit_code = 3


class GateError(MptqError):
    """The output is written, and less faithful than the user's limits allow."""

    exit_code = 3
