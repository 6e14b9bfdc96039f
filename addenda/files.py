"""Atomic writes, file locks, and folders that belong to Addenda, from which only its own files are deleted."""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there an open file cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

from addenda.exceptions import DataError

UNFINISHED = ".unfinished"
OUTPUT, OUTPUT_TEXT = ".addenda-output", "Results of an Addenda benchmark: another run replaces its files.\n"

log = logging.getLogger(__name__)


@contextmanager
def written(path: Path, mode: int | None = None, replace: bool = True) -> Iterator[Path]:
    """Writes a file atomically: yields a temporary path beside it, which gets its name after fsync or is deleted.

    A killed process leaves a temporary file that `is_unfinished` recognises. The file is created with its final
    permissions, less the umask; by default those of the file that it replaces.
    """
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # names are limited to 255 bytes
    unfinished = path.with_name(f".{name}.{secrets.token_hex(8)}{UNFINISHED}")
    if mode is None:
        mode = permissions(path) if path.exists() else 0o666
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield unfinished
        put(unfinished, path, replace)
    finally:
        unfinished.unlink(missing_ok=True)


def put(unfinished: Path, path: Path, replace: bool) -> None:
    """Syncs a temporary file and renames it to `path`; without `replace`, raises FileExistsError if that exists."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    if replace:
        unfinished.replace(path)
    else:
        try:
            os.link(unfinished, path)
        except OSError as error:  # the path exists, or the file system has no hard links
            if os.path.lexists(path):
                raise FileExistsError(f"{str(path)!r} already exists") from error
            unfinished.replace(path)
    with suppress(OSError):  # some file systems cannot sync a folder; the file itself is complete
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_unfinished(path: Path, of: str) -> bool:
    """Whether a file is a temporary file of `written`, for a target whose full name matches the pattern `of`."""
    return re.fullmatch(rf"\.(?:{of})\.[0-9a-f]{{16}}{re.escape(UNFINISHED)}", path.name) is not None


def expanded(path: str | Path) -> Path:
    """A path with the home folder in place of `~` or `~USER`; raises DataError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise DataError(f"{str(path)!r}: there is no user with this home folder. Check the path.") from error


def permissions(path: Path) -> int:
    """The read and write permissions of a file, as `written` takes them."""
    return stat.S_IMODE(path.stat().st_mode) & 0o666


def claim(folder: Path, marker: str, text: str) -> None:
    """Creates a folder with a marker file, private to this user, or accepts an existing one that has the marker.

    Raises:
        PermissionError: the folder is a link, belongs to another user, or is writable by others.
        FileExistsError: the folder holds files but no such marker.
    """
    with suppress(FileExistsError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    check_private(folder)
    if not _marked(folder, marker, text):
        raise FileExistsError(f"{str(folder)!r} holds files that are not Addenda's")


def _marked(folder: Path, marker: str, text: str) -> bool:
    """Whether a folder has the marker; an empty folder gets it now."""
    if is_claimed(folder, marker, text):
        return True
    if any(path.name != marker and not is_unfinished(path, re.escape(marker)) for path in folder.iterdir()):
        return False
    with written(folder / marker) as unfinished:
        unfinished.write_text(text)
    return True


def is_claimed(folder: Path, marker: str, text: str) -> bool:
    """Whether a folder has the marker and is not a link."""
    try:
        return not folder.is_symlink() and (folder / marker).read_text() == text
    except (OSError, ValueError):
        return False


def check_private(folder: Path) -> None:
    """Raises PermissionError if a folder is a link, or if other users could have put files into it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{str(folder)!r} is a link or a file, not a folder")
    if not hasattr(os, "geteuid"):  # Windows has no such permissions
        return
    if status.st_uid != os.geteuid():
        raise PermissionError(f"{str(folder)!r} belongs to another user (uid {status.st_uid})")
    if status.st_mode & 0o022:
        raise PermissionError(f"{str(folder)!r} is writable by its group or others; run chmod go-w on it")


def output_folder(folder: Path) -> None:
    """Creates the output folder of a benchmark, or accepts one that a benchmark created; raises DataError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _marked(folder, OUTPUT, OUTPUT_TEXT):
            raise DataError(
                f"{str(folder)!r} holds files and is not the output folder of a benchmark (no {OUTPUT}). Pass a new or "
                "empty folder with --out."
            )
    except OSError as error:
        raise DataError(
            f"The folder {str(folder)!r} cannot be used ({error.strerror}). Pass another folder with --out."
        ) from error


class Hold:
    """A lock on a file that marks its folder as in use; released with the object or the process.

    Raises BlockingIOError if another process holds it. On a file system without locks it always succeeds.
    """

    def __init__(self, path: Path, shared: bool) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDONLY if shared else os.O_RDWR)  # locks over NFS require these modes
        try:
            if fcntl is not None:
                fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise BlockingIOError(error.errno, os.strerror(error.errno), str(path)) from error

    def close(self) -> None:
        """Releases the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    __del__ = close


def discard(folder: Path, ours: str, marker: str | None = None) -> bool:
    """Deletes Addenda's own files in a folder, and the folder if it is then empty.

    Args:
        folder: the folder; a link to a folder is left alone.
        ours: pattern of the full names of Addenda's own files and folders; links are left alone.
        marker: name of the folder's marker file, which is deleted last.

    Returns:
        Whether the folder is gone.
    """
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    empty = True
    with suppress(FileNotFoundError):  # another process may be deleting it too
        for path in sorted(folder.iterdir()):
            if path.name == marker:
                continue
            is_ours = re.fullmatch(ours, path.name) is not None or is_unfinished(path, ours)
            if path.is_symlink() or not is_ours:
                leave_alone(path)
                empty = False
            elif path.is_dir():
                empty = discard(path, ours) and empty
            else:
                with suppress(OSError):
                    path.unlink()
        if empty:
            with suppress(OSError):
                if marker is not None:
                    (folder / marker).unlink(missing_ok=True)
                folder.rmdir()
    return not folder.exists()


@cache
def leave_alone(path: Path) -> None:
    """Logs once that a file or folder was not created by Addenda and stays."""
    log.warning("%s was not created by Addenda and is left alone.", path)
