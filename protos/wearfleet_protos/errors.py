"""Every error that wearfleet raises on purpose.

::

    WearfleetError
    |-- ConfigError          a setting, flag or file of settings is wrong
    |-- DataError            a data set, recording or archive is wrong
    |-- ShapeError           an array has the wrong shape, dtype or values
    |-- ProtocolError        a message cannot be understood or breaks the rules
    |-- TransportError       the network or the peer failed; ``retryable`` says whether to try again
    |-- IntegrityError       bytes are not what was signed, promised or expected
    |   `-- ModelContractError   a model does not offer what its reader needs
    |-- AggregationError     updates cannot be combined
    |-- DeniedError          the caller may not do this
    |-- NotFoundError        the thing asked for does not exist
    `-- ConflictError        the thing exists already, or changed meanwhile
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "AggregationError",
    "ConfigError",
    "ConflictError",
    "DataError",
    "DeniedError",
    "IntegrityError",
    "ModelContractError",
    "NotFoundError",
    "ProtocolError",
    "ShapeError",
    "TransportError",
    "WearfleetError",
]


class WearfleetError(Exception):
    """Root of all errors raised on purpose; ``exit_code`` is what a command line ends with."""

    exit_code: ClassVar[int] = 1


class ConfigError(WearfleetError):
    """A setting, flag or settings file is wrong."""

    exit_code = 2


class DataError(WearfleetError):
    """A data set, recording or archive is missing, truncated or malformed."""


class ShapeError(WearfleetError):
    """An array has the wrong shape, dtype or holds values that are not finite."""


class ProtocolError(WearfleetError):
    """A message cannot be understood, is too large, or breaks the rules of its conversation."""


class TransportError(WearfleetError):
    """The network or the peer failed.

    Args:
        message: what was tried and what happened.
        retryable: True when the same call may succeed later.
    """

    exit_code = 75

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable


class IntegrityError(WearfleetError):
    """Bytes are not what was signed, promised or expected."""


class ModelContractError(IntegrityError):
    """A model lacks an input, output or metadata entry that its reader needs."""


class AggregationError(WearfleetError):
    """Updates cannot be combined: none given, or shapes or values do not fit."""


class DeniedError(WearfleetError):
    """The caller is not allowed to do this."""

    exit_code = 4


class NotFoundError(WearfleetError):
    """The thing asked for does not exist."""

    exit_code = 3


class ConflictError(WearfleetError):
    """The thing exists already with other content, or changed meanwhile."""

    exit_code = 5
