"""One clear line for the user instead of a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

NO_ACCESS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS),
    *(
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOENT,
        errno.ENAMETOOLONG,
    ),  # no such place for a file
)
TOO_LITTLE_MEMORY = "the machine is out of memory: use a smaller --batch_size or --img_size"


class UserError(Exception):
    """Something the user can mend. The message is one line that says what is wrong and what to do."""

    def __str__(self) -> str:
        return " ".join(
            super().__str__().splitlines()
        )  # libraries' errors, which many messages quote, have more lines


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; what a user can mend ends it with one line on stderr and an exit code other than 0."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # tables have letters that not every terminal has
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # a reader that is gone shows here at the latest
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the Python package {error.name!r} is missing: pip install -r requirements.txt"
        )
    except KeyboardInterrupt:
        print("\ninterrupted; files already written are complete", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # a reader such as `head` has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or Python would complain of what is left to write
        sys.exit(141)  # as a shell says of SIGPIPE
    except OSError as error:
        if error.errno not in NO_ACCESS:
            raise
        verb = "read or write" if error.errno in (errno.EACCES, errno.EPERM) else "write"
        sys.exit(
            f"error: cannot {verb} {error.filename or 'a file'}: {error.strerror}; free space or name another folder"
        )
    except MemoryError:
        sys.exit(f"error: {TOO_LITTLE_MEMORY}")
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # torch's, on a CPU
            sys.exit(f"error: {TOO_LITTLE_MEMORY}")
        if (
            type(error).__name__ != "OutOfMemoryError"
        ):  # torch.cuda.OutOfMemoryError, without importing torch
            raise
        sys.exit("error: the GPU is out of memory: use a smaller --batch_size")
