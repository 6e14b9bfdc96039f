"""The errors a user can meet. Each message says what was asked, what was found, and what to do."""

from __future__ import annotations


class AddendaError(Exception):
    """Every error that bad input can cause; the command line prints it as one line and exits with 2."""


class BackboneError(AddendaError):
    """A backbone that is unknown, out of scope, without weights, or not the one that a task was learned on."""


class DataError(AddendaError):
    """A data set that cannot be learned from or scored: empty, unreadable, or with the wrong labels."""


class UnsteadyError(DataError):
    """Data that are not what they were, or not what they say: all are in doubt, so that nothing is left out."""


class TooLargeError(DataError):
    """An image of more pixels, or a file of more bytes, than is taken."""


class RegistryError(AddendaError):
    """A registry that cannot be opened, or that refuses a change."""


class RegistryUnavailableError(RegistryError):
    """A database that does not answer now; what was asked may work later."""


class RegistryFaultError(RegistryError):
    """A database that refuses what is asked of every registry: its schema is damaged, or there is a fault of ours."""


class UnknownTaskError(RegistryError):
    """A name, version or alias that the registry does not hold."""


class NameTakenError(RegistryError):
    """A task name that is already registered with other content."""

    def __init__(self, name: str, version: int) -> None:
        super().__init__(
            f"Task {name!r} is already registered (version {version}) with other content. Choose another name, or add "
            "a version of it with --new-version (in Python: new_version=True)."
        )


class OwnershipError(RegistryError):
    """A change to what somebody else made, by who may change only their own."""


class RetiredError(RegistryError):
    """What is asked for is there already, in a version that was retired."""

    def __init__(self, ref: str, reason: str) -> None:
        why = f" ({reason})" if reason else ""
        super().__init__(
            f"{ref!r} is the same task, and it was retired{why}. To have it active again, add it as a further version: "
            "--new-version (in Python: new_version=True)."
        )


class ConflictError(RegistryError):
    """A change that was asked for on the condition that something is as it no longer is."""


class IntegrityError(RegistryError):
    """Stored bytes that no longer hash to what was recorded, or do not describe a valid task."""


class ExactnessError(AddendaError):
    """The device's arithmetic broke the exactness contract: a result depended on what it must not depend on."""


class TrainingError(AddendaError):
    """A run that gave no usable task."""


class KeyFileError(AddendaError):
    """A file of API keys that cannot be read or changed, or a key that it lacks."""


class OverloadedError(AddendaError):
    """More images wait for an answer than the server lets wait.

    Attributes:
        retry_after_s: after how many seconds there may be room.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(AddendaError):
    """An answer that was not ready when its time was over."""
