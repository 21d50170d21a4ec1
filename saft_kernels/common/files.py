"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".saft-tmp"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or write elsewhere"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "write to a folder that is yours"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTEMPTY), "somebody else has just made it: name another"),
}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An open file beside `path`; renamed to `path` on success, removed on error.

    A file that is replaced passes on its mode and owner. A link is written through. What a killed process has left of
    an earlier file for `path` is removed.

    Raises:
        OSError: What `output` raises; or the file cannot be written. `path` is then as it was.
    """
    target = output(path)
    with _temporary(path, target) as (temporary, descriptor):
        with suppress(FileNotFoundError):
            _take_mode(descriptor, target.stat())
        # closed, and so known to be written, before it is renamed; the descriptor keeps the lock
        with open(os.dup(descriptor), "wb") as file:
            yield file
        os.replace(temporary, target)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `path` to fill; renamed to `path` on success, removed with all that is in it on error.

    Raises:
        OSError: What `new_output` raises; or a file in it cannot be written.
    """
    target = new_output(path)
    with _temporary(path, target, folder=True) as (temporary, _):
        yield temporary
        os.rename(temporary, target)


def output(path: str | os.PathLike[str]) -> Path:
    """The file that writing to `path` replaces or makes: where its links lead.

    Raises:
        OSError: There is no such folder, or it is not to be written to; or `path` is a folder, a device or a read-only
            file.
    """
    target = Path(os.path.realpath(path))
    try:
        # of `path`: in /proc and /dev/fd there are links to what has no name
        mode = os.stat(path).st_mode if os.path.exists(path) else target.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = stat.S_IFREG
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{os.fspath(path)}: expected a file, got a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise OSError(
            f"{os.fspath(path)}: expected a regular file, got a link to itself, a device or a pipe; name a file"
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(
            f"{os.fspath(path)}: expected a file that may be written, got a read-only one; make it writable, or name "
            "another"
        )
    _check_folder(path, target.parent)
    return target


def new_output(path: str | os.PathLike[str]) -> Path:
    """The folder that `new_folder` makes, or fills where an empty one is there.

    Raises:
        OSError: There is something already, or the folder around it is not to be written to.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{os.fspath(path)}: expected the name of a new folder, got one that is there; remove it, or name another"
        )
    _check_folder(path, target.parent)
    return target


def _check_folder(path: str | os.PathLike[str], folder: Path) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)}: expected an existing folder; make {folder} first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{os.fspath(path)}: expected a folder that may be written to, got {folder}; write to one that is yours"
        )


# ---- temporary names ----


@contextmanager
def _temporary(path: str | os.PathLike[str], target: Path, *, folder: bool = False) -> Iterator[tuple[Path, int]]:
    """A new file or folder beside `target`, locked for as long as its writer lives; removed if it is still there.

    Errors about it, or about no file, name `path`.
    """
    _remove_abandoned(target)
    temporary, descriptor = _temporary_name(target), -1
    try:
        while (descriptor := _create(temporary, folder)) < 0:
            temporary = _temporary_name(target)
        yield temporary, descriptor
    except (OSError, RuntimeError) as error:
        # torch.save hides an OSError behind a RuntimeError about positions in its archive
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError) or not str(reason.filename or temporary).startswith(str(temporary)):
            raise
        remedy = _REMEDIES.get(reason.errno or 0, "write elsewhere")
        named = type(reason)(f"{os.fspath(path)}: expected to write it, got: {reason.strerror or reason}; {remedy}")
        named.errno = reason.errno
        raise named from error
    finally:
        # also where a signal has come between its making and the descriptor
        _remove(temporary, folder)
        if descriptor >= 0:
            os.close(descriptor)


def _temporary_name(target: Path) -> Path:
    return target.with_name(f"{_prefix(target)}{os.urandom(8).hex()}{_SUFFIX}")


def _create(temporary: Path, folder: bool) -> int:
    """A locked descriptor, or -1 where somebody has removed it as abandoned before it was locked."""
    if folder:
        temporary.mkdir()
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
    else:
        # the process's umask applies here
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with suppress(OSError):  # a file system without locks: nobody can lock it then, so nobody removes it
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    if _same(descriptor, temporary):
        return descriptor
    os.close(descriptor)
    return -1


def _remove_abandoned(target: Path) -> None:
    """Removes temporary files for `target` that nobody has locked: their writers were killed."""
    pattern = re.compile(re.escape(_prefix(target)) + "[0-9a-f]{16}" + re.escape(_SUFFIX))
    with suppress(OSError):
        for name in [name for name in os.listdir(target.parent) if pattern.fullmatch(name)]:
            path = target.with_name(name)
            with suppress(OSError):
                folder = stat.S_ISDIR(path.lstat().st_mode)
                flags = os.O_RDONLY if folder else os.O_RDWR
                descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _same(descriptor, path):
                        _remove(path, folder)
                finally:
                    os.close(descriptor)


def _prefix(target: Path) -> str:
    # a name has room for 255 bytes
    name = target.name if len(os.fsencode(target.name)) <= 200 else hashlib.sha256(os.fsencode(target.name)).hexdigest()
    return f".{name}."


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _remove(path: Path, folder: bool) -> None:
    if folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _take_mode(descriptor: int, old: os.stat_result) -> None:
    mode = stat.S_IMODE(old.st_mode) & 0o777
    with suppress(OSError):
        os.fchown(descriptor, -1, old.st_gid)
    if os.fstat(descriptor).st_gid != old.st_gid:
        mode &= ~0o070 | (mode & 0o007) << 3  # another group: what everybody may
    with suppress(OSError):
        os.fchown(descriptor, old.st_uid, -1)
    os.fchmod(descriptor, mode)
