"""API keys: random, stored as SHA-256 digests in a file that can be edited while the server runs."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError

from addenda.exceptions import KeyFileError
from addenda.files import expanded, permissions, written

SCOPES = ("predict", "register", "admin")
"""Each scope includes those before it."""
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class Key:
    """The record of an API key: its name, its scope and its SHA-256; the key itself is not stored."""

    name: str
    scope: str
    sha256: str
    created_at: str

    def allows(self, scope: str) -> bool:
        """Whether the key's scope includes `scope`."""
        return SCOPES.index(scope) <= SCOPES.index(self.scope)


_KEYS = TypeAdapter(list[Key])


class KeyFile:
    """A JSON file of keys, reread whenever it changes; a missing file holds no keys."""

    def __init__(self, path: str | Path) -> None:
        self.path = expanded(path)
        self._version: object = None
        self._existed: memoryview | list[int] = [0]  # of each process of the server
        self._own = 0
        self._keys: dict[str, Key] = {}
        self.keys()

    def keys(self) -> list[Key]:
        """The records of all keys, oldest first."""
        try:
            stat = self.path.stat()
            version = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if version != self._version:
                keys = _KEYS.validate_json(self.path.read_bytes(), strict=True)
                if any(key.scope not in SCOPES for key in keys):
                    raise KeyFileError(
                        f"Key file {str(self.path)!r} has an unknown scope. Scopes: {', '.join(SCOPES)}."
                    )
                self._keys, self._version = {key.sha256: key for key in keys}, version
        except FileNotFoundError:
            self._keys, self._version = {}, None
        except (OSError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise KeyFileError(f"Key file {str(self.path)!r} cannot be read: {reason}.") from error
        return list(self._keys.values())

    @property
    def guards(self) -> bool:
        """Whether keys are required: the file exists, or any process of the server has seen it exist."""
        if not any(self._existed):
            self._existed[self._own] = self.path.exists()
        return any(self._existed)

    def share(self, existed: memoryview | list[int], own: int) -> None:
        """Shares with the server's other processes that the file has existed."""
        existed[own], self._existed, self._own = self.guards, existed, own

    def find(self, key: str) -> Key | None:
        """The record of a key, or None if the key is not valid."""
        self.keys()
        return self._keys.get(_digest(key))

    def create(self, name: str, scope: str) -> str:
        """Adds a key and returns it; it cannot be read again."""
        if not NAME.fullmatch(name):
            raise KeyFileError(
                f"{name!r} is not a valid key name: use up to 63 lower-case letters, digits, '.', '_' and '-', "
                "starting with a letter or digit."
            )
        if scope not in SCOPES:
            raise KeyFileError(f"Unknown scope {scope!r}. Scopes: {', '.join(SCOPES)}.")
        key = f"addenda_{secrets.token_urlsafe(32)}"
        with self._changing() as keys:
            if any(record.name == name for record in keys):
                raise KeyFileError(f"Key {name!r} already exists. Revoke it first, or choose another name.")
            keys.append(Key(name, scope, _digest(key), datetime.now(UTC).isoformat(timespec="seconds")))
        return key

    def revoke(self, name: str) -> None:
        """Removes a key."""
        if not self.path.exists():
            raise KeyFileError(f"There is no key file {str(self.path)!r}; check the path.")
        with self._changing() as keys:
            remaining = [key for key in keys if key.name != name]
            if len(remaining) == len(keys):
                known = ", ".join(repr(key.name) for key in keys) or "none"
                raise KeyFileError(f"There is no key {name!r}. Known: {known}.")
            keys[:] = remaining

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        """The records, to be changed in place; then the file is replaced atomically, with its owner and permissions.

        A new file is readable by its creator only.
        """
        path = self.path.resolve()  # where a link points: it stays a link, and all who use the file share a lock
        if not path.parent.is_dir():
            raise KeyFileError(f"The key file's folder {str(path.parent)!r} does not exist; create it first.")
        lock = path.with_name(f"{path.name}.lock")
        try:
            with FileLock(lock):
                self._keep_access(lock)
                keys = self.keys()
                yield keys
                with written(path, mode=0o600) as unfinished:
                    unfinished.write_bytes(_KEYS.dump_json(keys, indent=2) + b"\n")
                    self._keep_access(unfinished)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise KeyFileError(f"Key file {str(self.path)!r} cannot be written: {error.strerror}{where}.") from error

    def _keep_access(self, file: Path) -> None:
        """Gives a file the key file's owner and permissions, so that its server and its owner can still use it."""
        if not self.path.exists():
            return
        old, new = self.path.stat(), file.stat()
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            try:
                os.chown(file, old.st_uid, old.st_gid)
            except PermissionError as error:
                raise KeyFileError(
                    f"Key file {str(self.path)!r} belongs to another user (uid {old.st_uid}, gid {old.st_gid}), and a "
                    "server of that user could not read a new one. Run the command as that user or as root."
                ) from error
        file.chmod(permissions(self.path))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
