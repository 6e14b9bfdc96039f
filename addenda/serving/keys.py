"""API keys: random, and kept as their SHA-256 in a file that can be changed while the server runs."""

from __future__ import annotations

import hashlib
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
from addenda.files import written

SCOPES = ("predict", "register", "admin")
"""What a key allows; each scope includes those before it."""
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class Key:
    """An API key as it is kept: who holds it, the most that it allows, and the SHA-256 of what nobody keeps."""

    name: str
    scope: str
    sha256: str
    created_at: str

    def allows(self, scope: str) -> bool:
        """Whether it may do what a scope stands for."""
        return SCOPES.index(scope) <= SCOPES.index(self.scope)


_KEYS = TypeAdapter(list[Key])


class KeyFile:
    """A JSON file of keys; a change of it counts from the next request on, and one that is missing holds no key."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._seen: object = None
        self._there = False
        self._keys: dict[str, Key] = {}
        self.keys()

    def keys(self) -> list[Key]:
        """Its keys, oldest first."""
        try:
            stat = self.path.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                found = _KEYS.validate_json(self.path.read_bytes(), strict=True)
                if any(key.scope not in SCOPES for key in found):
                    raise KeyFileError(f"The keys {str(self.path)!r} name a scope that is none of {', '.join(SCOPES)}.")
                self._keys, self._seen = {key.sha256: key for key in found}, seen
        except FileNotFoundError:
            self._keys, self._seen = {}, None
        except (OSError, ValidationError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error.strerror
            raise KeyFileError(f"The keys {str(self.path)!r} cannot be read: {why}.") from error
        return list(self._keys.values())

    @property
    def guards(self) -> bool:
        """Whether the file has ever been there: then keys are asked for, even when it is gone."""
        self._there = self._there or self.path.exists()
        return self._there

    def find(self, key: str) -> Key | None:
        """The key as it is kept, if it is one."""
        self.keys()
        return self._keys.get(_digest(key))

    def create(self, name: str, scope: str) -> str:
        """Adds a key and gives it out, this once."""
        if not NAME.fullmatch(name):
            raise KeyFileError(f"{name!r} is no name of a key: use lower-case letters, digits, '.', '_' and '-'.")
        if scope not in SCOPES:
            raise KeyFileError(f"There is no scope {scope!r}. Scopes: {', '.join(SCOPES)}.")
        key = f"addenda_{secrets.token_urlsafe(32)}"
        with self._changing() as keys:
            if any(known.name == name for known in keys):
                raise KeyFileError(f"There is a key {name!r} already. Revoke it first, or choose another name.")
            keys.append(Key(name, scope, _digest(key), datetime.now(UTC).isoformat(timespec="seconds")))
        return key

    def revoke(self, name: str) -> None:
        """Takes a key away."""
        with self._changing() as keys:
            left = [key for key in keys if key.name != name]
            if len(left) == len(keys):
                known = ", ".join(repr(key.name) for key in keys) or "none"
                raise KeyFileError(f"There is no key {name!r}. Known: {known}.")
            keys[:] = left

    @contextmanager
    def _changing(self) -> Iterator[list[Key]]:
        """The keys, written back as a whole, readable by their owner alone."""
        try:
            with FileLock(f"{self.path}.lock"):
                keys = self.keys()
                yield keys
                with written(self.path, mode=0o600) as unfinished:
                    unfinished.write_bytes(_KEYS.dump_json(keys, indent=2) + b"\n")
        except OSError as error:
            raise KeyFileError(f"The keys {str(self.path)!r} cannot be written: {error.strerror}.") from error


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
