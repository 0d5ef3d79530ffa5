"""One clear line for the user instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

NO_ACCESS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    # no room
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    # no such place for a file
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)
"""Errors of the operating system that a user can mend."""

TOO_LITTLE_MEMORY = "the machine is out of memory: use a smaller --batch_size or --img_size"


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""

    def __str__(self) -> str:
        # many messages quote libraries, whose errors have more lines
        return " ".join(super().__str__().splitlines())


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`.

    What a user can mend ends it with one line on stderr and an exit code other than 0.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # tables have letters that not every terminal has
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a reader that is gone shows here at the latest
    except KeyboardInterrupt:
        print("\ninterrupted; files already written are complete", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        # or Python would complain of what is left to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as a shell says of SIGPIPE
    except Exception as error:
        line = _mendable(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def _mendable(error: Exception) -> str | None:
    """What to tell the user of an error; None if only a programmer can mend it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name!r} is missing: pip install -r requirements.txt"
    if isinstance(error, OSError) and error.errno in NO_ACCESS:
        verb = "read or write" if error.errno in (errno.EACCES, errno.EPERM) else "write"
        what = error.filename or "a file"
        return f"cannot {verb} {what}: {error.strerror}; free space or name another folder"
    # torch's own error on a CPU is a RuntimeError
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return TOO_LITTLE_MEMORY
    if type(error).__name__ == "OutOfMemoryError":  # torch.cuda's, without importing torch
        return "the GPU is out of memory: use a smaller --batch_size"
    return None
