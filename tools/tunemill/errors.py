"""Every error Tunemill raises on purpose, each with its exit code.

A message is one line: what is wrong, where, and what to do about it. Library code raises
these; only ``cli.py`` turns them into a line on stderr and an exit code. The table of codes
in ``docs/exit-codes.md`` is checked against this module by a test.
"""

from __future__ import annotations

from typing import ClassVar


class TunemillError(Exception):
    """Base of all expected errors. ``str(error)`` is the one line shown to the user."""

    exit_code: ClassVar[int] = 1


class UsageError(TunemillError):
    """The request itself is wrong: an unknown model, task, key, option or reference."""

    exit_code = 2


class BadDataError(TunemillError):
    """An input was read and is not what it has to be: malformed, empty, incomplete."""

    exit_code = 65


class IntegrityError(BadDataError):
    """Bytes do not match the digest or the signature they were promised under."""


class TransientError(TunemillError):
    """Something outside failed that may work later: the network, a full disk, a lock."""

    exit_code = 75


class ConflictError(TransientError):
    """Another writer won the race for a name; nothing of ours became visible under it."""


class DeniedError(TunemillError):
    """Credentials are missing, refused, or lack a right; the message names which."""

    exit_code = 77


class ConfigurationError(TunemillError):
    """The installation, the host or the store is not fit for what was asked of it."""

    exit_code = 78


class Stopped(TunemillError):
    """SIGTERM arrived; what could be saved was saved and nothing half-done is visible."""

    exit_code = 143


class Interrupted(TunemillError):
    """Ctrl-C (SIGINT) arrived; what could be saved was saved."""

    exit_code = 130
