"""Every error a user can cause. Programmer errors stay `assert` and `TypeError`."""

import re

_PASSWORD = re.compile(r"(:/{1,2}[^\s/:@'\"]*:)[^\s@'\"]+@")
"""In an address, wherever a message quotes one."""


class ProjectError(Exception):
    """Root of the project's errors: the CLI prints `str(error)` without a traceback and exits with code 2.

    A message says what is wrong, where (file and dotted path), what was got, what was expected, and what to do. It is
    one line, whatever keys and texts it quotes: control characters are escaped, so that none reaches a terminal, and a
    password in an address is masked.
    """

    def __init__(self, message: str = "") -> None:
        line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in message.replace("\n", " "))
        super().__init__(_PASSWORD.sub(r"\1***@", line))


class ConfigError(ProjectError):
    """A study file, or a value drawn from its search space, is not valid."""


class DataError(ProjectError):
    """Training or reference data is missing, unreadable or not what the configuration says."""


class ModelError(ProjectError):
    """A model folder is missing, incomplete or of another kind than the configuration says."""


class LaunchError(ProjectError):
    """A launcher could not submit, poll or cancel a job."""


class StorageError(ProjectError):
    """A study's storage is in use, belongs to something else, or cannot be opened."""


class TrackerError(ProjectError):
    """A tracker's store could not be reached or refused an update; the study goes on without it."""


class CheckpointError(ProjectError):
    """No checkpoint of a run can be read."""


class NonFiniteError(ProjectError):
    """A loss or gradient became infinite or NaN; training cannot go on."""


class StoppedError(ProjectError):
    """Training was told to end before its last step; it goes on from its checkpoint when it is started again."""
