"""The exceptions of Addenda. A message says what was asked, what was found, and what to do."""

from __future__ import annotations


class AddendaError(Exception):
    """Base class of all errors caused by bad input; the command line prints them as one line and exits with 2."""


class BackboneError(AddendaError):
    """The backbone is unknown, unsupported, has no weights, or is not the one that a task was learned on."""


class DataError(AddendaError):
    """A dataset cannot be used for training or evaluation: it is empty, unreadable, or has the wrong labels."""


class UnsteadyError(DataError):
    """Data changed while they were read, or contradict their own labels. They are never skipped as bad images."""


class TooLargeError(DataError):
    """An image has more pixels, or a file more bytes, than the limit."""


class RegistryError(AddendaError):
    """A registry cannot be opened, or refuses a change."""


class RegistryUnavailableError(RegistryError):
    """The database does not answer; the same request may succeed later."""


class RegistryFaultError(RegistryError):
    """The database rejects a valid statement: its schema is damaged, or Addenda has a bug."""


class UnknownTaskError(RegistryError):
    """The registry has no such name, version or alias."""


class NameTakenError(RegistryError):
    """The task name is already registered with other content; `other` says what differs."""

    def __init__(self, name: str, version: int, other: str = "content") -> None:
        super().__init__(
            f"Task {name!r} is already registered (version {version}) with other {other}. Choose another name, or add "
            "a version of it with --new-version (in Python: new_version=True)."
        )


class OwnershipError(RegistryError):
    """The caller may change only what they created themselves."""


class RetiredError(RegistryError):
    """The same task is already registered in a version that was retired."""

    def __init__(self, ref: str, reason: str) -> None:
        why = f" ({reason})" if reason else ""
        super().__init__(
            f"{ref!r} is the same task and was retired{why}. To reactivate it, add it as a new version with "
            "--new-version (in Python: new_version=True)."
        )


class ConflictError(RegistryError):
    """A conditional update whose precondition failed."""


class IntegrityError(RegistryError):
    """Stored bytes do not match their recorded hash, or do not describe a valid task."""


class ExactnessError(AddendaError):
    """The device violates the exactness contract: a result depended on something that it must not depend on."""


class TrainingError(AddendaError):
    """A training run has invalid settings or produced no usable task."""


class KeyFileError(AddendaError):
    """A file of API keys cannot be read or changed, or lacks a key."""


class OverloadedError(AddendaError):
    """The request queue is full.

    Attributes:
        retry_after_s: seconds after which to retry.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(AddendaError):
    """The request timed out."""
