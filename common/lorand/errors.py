"""Errors a user can meet. Every message says what to do next; the exit code is the command's."""


class LorandError(Exception):
    """Base of the errors that are reported without a traceback."""

    exit_code = 1


class ConfigError(LorandError):
    """A run file, a flag or a combination of them is wrong."""

    exit_code = 2


class DataError(LorandError):
    """A data file cannot be read, or its content does not fit the task."""

    exit_code = 3


class ModelError(LorandError):
    """A model cannot be loaded, or does not fit the run."""

    exit_code = 4


class HandshakeError(LorandError):
    """Coordinator and worker do not agree on protocol, run, model or parameters."""

    exit_code = 5


class Behind(HandshakeError):
    """A coordinator has fewer entries than one showed before: rolled back, or not yet told."""


class LedgerError(LorandError):
    """The ledger is corrupt, belongs to another run, or cannot be written."""

    exit_code = 6


class ConnectionLost(LorandError):
    """The coordinator could not be reached within the limits of the run."""

    exit_code = 7


class ContributionError(LorandError):
    """A contribution does not fit the round it claims to answer."""

    exit_code = 8


class BudgetSpent(LorandError):
    """A worker has released as much of its examples as the run's epsilon allows."""

    exit_code = 9
