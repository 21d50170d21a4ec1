"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".saft-tmp"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or write elsewhere"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "write to a folder that is yours"),
}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """An open file beside `path`; renamed to `path` on success, removed on error.

    A file that is replaced passes on its mode and group. A link is written through. What a killed process has left of
    an earlier file for `path` is removed.

    Raises:
        OSError: What `output` raises; or the file cannot be written. `path` is then as it was.
    """
    target = output(path)
    _remove_abandoned(target)
    try:
        temporary, file = _temporary(target)
    except OSError as error:
        raise _cannot_write(path, error) from error
    # the same lock: it outlives `file`, which is closed, and so known to be written, before it is renamed
    lock = os.dup(file.fileno())
    try:
        with file:
            yield file
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        # torch.save hides an OSError behind a RuntimeError about positions in its archive
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError) or reason.filename not in (None, str(temporary)):
            raise
        raise _cannot_write(path, reason) from error
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)


def output(path: str | os.PathLike[str]) -> Path:
    """The file that writing to `path` replaces or makes: where its links lead.

    Raises:
        OSError: There is no such folder, or it is not to be written to; or `path` is a folder, a device or a read-only
            file.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)}: expected an existing folder; make {target.parent} first")
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
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
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{os.fspath(path)}: expected a folder that may be written to, got {target.parent}; write to one that is "
            "yours"
        )
    return target


def _cannot_write(path: str | os.PathLike[str], error: OSError) -> OSError:
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(error.errno or 0, "write elsewhere")
    named = type(error)(f"{os.fspath(path)}: expected to write it, got: {reason}; {remedy}")
    named.errno = error.errno
    return named


# ---- temporary files ----


def _prefix(target: Path) -> str:
    # a name has room for 255 bytes
    name = target.name if len(os.fsencode(target.name)) <= 200 else hashlib.sha256(os.fsencode(target.name)).hexdigest()
    return f".{name}."


def _temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file, locked for as long as its writer lives, with the mode that `target` has or would get."""
    while True:
        temporary = target.with_name(f"{_prefix(target)}{os.urandom(8).hex()}{_SUFFIX}")
        # the process's umask applies here
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor)
            if not _same(descriptor, temporary):  # removed as abandoned before it was locked
                os.close(descriptor)
                continue
            with suppress(FileNotFoundError):
                _take_mode(descriptor, target.stat())
            return temporary, os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise


def _take_mode(descriptor: int, old: os.stat_result) -> None:
    mode = stat.S_IMODE(old.st_mode) & 0o777
    with suppress(OSError):
        os.fchown(descriptor, -1, old.st_gid)
    if os.fstat(descriptor).st_gid != old.st_gid:
        mode &= ~0o070 | (mode & 0o007) << 3  # another group: what everybody may
    with suppress(OSError):
        os.fchown(descriptor, old.st_uid, -1)
    os.fchmod(descriptor, mode)


def _remove_abandoned(target: Path) -> None:
    """Removes temporary files for `target` that nobody has locked: their writers were killed."""
    pattern = re.compile(re.escape(_prefix(target)) + "[0-9a-f]{16}" + re.escape(_SUFFIX))
    with suppress(OSError):
        for name in [name for name in os.listdir(target.parent) if pattern.fullmatch(name)]:
            path = target.with_name(name)
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _same(descriptor, path):
                        path.unlink()
                finally:
                    os.close(descriptor)


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks: nobody can lock it then, so nobody removes it
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
