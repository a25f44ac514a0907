"""Errors whose message is written for the person who made the request."""


class InputError(ValueError):
    """The request cannot be carried out as it stands; the message says what to do instead."""


class CheckpointError(InputError):
    """A weights file or folder is missing, damaged, or not what it was taken for."""


class NumericalError(RuntimeError):
    """A tensor stopped being finite; the message names the step."""
