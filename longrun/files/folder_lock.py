"""One owner at a time for a folder or a file that processes share, whatever way they end.

The lock is the kernel's (`flock`) on a small file that names its holder. It goes with the process, also after kill -9,
and holds between two owners of one process as well. Released, the file is removed.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import stat
import sys
import time
import weakref
from pathlib import Path

from longrun.errors import LongrunError, shortened

_NOTE_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


class FolderLock:
    """Held from the moment it is made until `release`, or until nothing refers to it any more.

    Args:
        path: the lock's file; its folder is made where there is none, and removed again if it is empty at the end.
        what: how a refusal calls that which is locked.
        error: what a refusal is.
        wait: what to do where somebody else holds it.
        instead: what to do in every case; a refusal ends with it.

    Raises:
        error: another owner holds it (its process, host, start and command are named), `path` is a link or no file, or
            the folder cannot be written or its file system knows no locks.
    """

    def __init__(self, path: Path, what: str, error: type[LongrunError], wait: str, instead: str) -> None:
        self.path, self._pid = path, os.getpid()
        what = shortened(what, 200)
        try:
            made = _make_folder(path.parent)
            descriptor = _open_locked(path)
        except BlockingIOError as busy:
            raise error(f"{what} is in use by {busy.args[1]}: {wait} or {instead}") from None
        except OSError as failure:
            reason = failure.strerror or str(failure)
            if failure.errno in _NO_LOCKS:
                reason = f"its file system gives no locks: {reason}"
            raise error(f"{what} cannot be written ({reason}): {instead}") from failure
        self._descriptor = descriptor
        self._finalize = weakref.finalize(self, _release, descriptor, path, self._pid, made)

    @property
    def held(self) -> bool:
        """Whether this process is still the owner: false once released, and where the file (perhaps with its folder)
        was removed or replaced."""
        return self._finalize.alive and os.getpid() == self._pid and _is_at(self._descriptor, self.path)

    def release(self) -> None:
        self._finalize()


def _make_folder(folder: Path) -> bool:
    if folder.is_dir():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return True


def _open_locked(path: Path) -> int:
    """A descriptor of the file at `path`, locked.

    Raises:
        BlockingIOError: (errno, who holds it).
        OSError: it cannot be had at all.
    """
    import fcntl  # not at the top: Windows lacks it, and is refused in a sentence of its own

    while True:
        # Never through a link, and never waiting for whoever reads a pipe.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, f"{path.name} is no file")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(errno.EWOULDBLOCK, _holder(descriptor)) from None
            if _is_at(descriptor, path):  # not one that its owner has just removed
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _note(), 0)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    own = os.fstat(descriptor)
    try:
        there = os.lstat(path)
    except OSError:
        return False
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _note() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    command = shortened(shlex.join(sys.orig_argv), 300)
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}).encode()


def _holder(descriptor: int) -> str:
    """Who holds the lock, as its note says; a note that cannot be read names nobody."""
    try:
        note = json.loads(os.pread(descriptor, _NOTE_BYTES, 0))
        pid, host, since, command = (shortened(note[key]) for key in ("pid", "host", "since", "command"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
    if (pid, host) == (str(os.getpid()), socket.gethostname()):
        return f"another owner in this process (since {since})"
    return f"process {pid} on {host} since {since} ({command})"


def _release(descriptor: int, path: Path, pid: int, made: bool) -> None:
    """Remove the file while the lock is held, then let go. A forked child only closes what it inherited."""
    try:
        if os.getpid() == pid and _is_at(descriptor, path):
            path.unlink(missing_ok=True)
            if made:
                path.parent.rmdir()
    except OSError:  # not empty, or no longer ours to change: the lock still ends
        pass
    finally:
        os.close(descriptor)
