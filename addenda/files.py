"""Whose files: writing a file whole or not at all, and deleting only what Addenda made itself."""

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
    """Gives a place beside a file to write it in; it gets the file's name once it is on the disk, or is deleted.

    A process that is killed leaves what `is_unfinished` knows by its name. The file has its permissions, less the
    umask, from the start: by default those of the file that it replaces.
    """
    name = path.name.encode()[:200].decode(errors="ignore")  # a name has 255 bytes at most
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
    """Gives a file on the same file system its name once it is on the disk; FileExistsError if it may not replace."""
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    if replace:
        unfinished.replace(path)
    else:
        try:
            os.link(unfinished, path)
        except OSError as error:  # it is there, or the file system has no hard links
            if os.path.lexists(path):
                raise FileExistsError(f"{str(path)!r} exists already") from error
            unfinished.replace(path)
    with suppress(OSError):  # not every file system has it; the file is whole all the same
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def is_unfinished(path: Path, of: str) -> bool:
    """Whether a file is one that `written` was making, of a target whose whole name matches a pattern."""
    return re.fullmatch(rf"\.(?:{of})\.[0-9a-f]{{16}}{re.escape(UNFINISHED)}", path.name) is not None


def permissions(path: Path) -> int:
    """Who may read and write a file, as `written` takes it."""
    return stat.S_IMODE(path.stat().st_mode) & 0o666


def claim(folder: Path, marker: str, text: str) -> None:
    """Makes a folder that is Addenda's own, for this user alone, or finds it; a marker file in it says whose it is.

    Raises:
        PermissionError: it is a link, another user owns it, or others may write to it.
        FileExistsError: it holds files and has no such marker.
    """
    with suppress(FileExistsError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700)
    check_private(folder)
    if not _marked(folder, marker, text):
        raise FileExistsError(f"{str(folder)!r} has files in it that are not Addenda's")


def _marked(folder: Path, marker: str, text: str) -> bool:
    """Whether a folder has a marker, which it gets now if nothing else is in it."""
    if is_claimed(folder, marker, text):
        return True
    if any(path.name != marker and not is_unfinished(path, re.escape(marker)) for path in folder.iterdir()):
        return False
    with written(folder / marker) as unfinished:
        unfinished.write_text(text)
    return True


def is_claimed(folder: Path, marker: str, text: str) -> bool:
    """Whether a folder has the marker of Addenda's own; a link to one has not."""
    try:
        return not folder.is_symlink() and (folder / marker).read_text() == text
    except (OSError, ValueError):
        return False


def check_private(folder: Path) -> None:
    """Raises PermissionError where a folder is a link, or somebody else could have put files into it."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{str(folder)!r} is a link or a file, not a folder")
    if not hasattr(os, "geteuid"):  # Windows has other permissions
        return
    if found.st_uid != os.geteuid():
        raise PermissionError(f"{str(folder)!r} belongs to another user (uid {found.st_uid})")
    if found.st_mode & 0o022:
        raise PermissionError(f"others may write to {str(folder)!r} (chmod go-w would end that)")


def output_folder(folder: Path) -> None:
    """Makes a folder for what a benchmark finds, or finds one that it made: nobody else's report is overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _marked(folder, OUTPUT, OUTPUT_TEXT):
            raise DataError(
                f"{str(folder)!r} has files in it and not the marker of a benchmark's folder ({OUTPUT}): name a new or "
                "empty folder (--out)."
            )
    except OSError as error:
        raise DataError(
            f"Nothing can be written to {str(folder)!r} ({error.strerror}): name another folder (--out)."
        ) from error


class Hold:
    """A lock on a file, by which processes see that its folder is in use; it goes with the object or the process.

    BlockingIOError where somebody else holds it; where the file system knows no locks, everybody gets one.
    """

    def __init__(self, path: Path, shared: bool) -> None:
        self._file = -1
        self._file = os.open(path, os.O_RDONLY if shared else os.O_RDWR)  # as locks over NFS ask for
        try:
            if fcntl is not None:
                fcntl.flock(self._file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self.close()
                raise BlockingIOError(error.errno, os.strerror(error.errno), str(path)) from error

    def close(self) -> None:
        """Gives it up."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    __del__ = close


def discard(folder: Path, ours: str, marker: str | None = None) -> bool:
    """Deletes what Addenda made in a folder, and the folder where nothing else is left in it: whether it is gone.

    Args:
        folder: the folder; a link to one is left alone.
        ours: a pattern that the whole names of Addenda's own files and folders match; links are left alone.
        marker: the name of the file that says whose the folder is: it stays as long as anything else does.
    """
    if folder.is_symlink() or not folder.is_dir():
        return not os.path.lexists(folder)
    empty = True
    with suppress(FileNotFoundError):  # another process may be at it too
        for path in sorted(folder.iterdir()):
            if path.name == marker:
                continue
            own = re.fullmatch(ours, path.name) is not None or is_unfinished(path, ours)
            if path.is_symlink() or not own:
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
    """Says, once, that a file or folder is not Addenda's own and stays."""
    log.warning("%s is not Addenda's own and is left alone.", path)
