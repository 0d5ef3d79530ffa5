"""One clear line for the user instead of a traceback."""

from __future__ import annotations

import atexit
import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

OWN_FAULTS = (errno.EBADF, errno.EINVAL)
"""What the system answers to a wrong program. All else that it refuses can be mended."""

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}
"""Module -> the package that brings it, where that has another name."""


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""

    def __str__(self) -> str:
        # many messages quote libraries, whose errors have more lines
        return " ".join(super().__str__().splitlines())


class _Quiet:
    """A text stream that goes on where it cannot be written to any more.

    A terminal that is gone or a full disk behind the progress bar is no reason to end a training.
    """

    def __init__(self, stream: TextIO | None):
        # None: the process was started with it closed
        self._stream = stream or open(os.devnull, "w")  # noqa: PTH123, SIM115

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def run(main: Callable[[], None], needs_stdout: bool = True) -> None:
    """Run a script's `main`.

    What a user can mend ends it with one line on stderr and an exit code other than 0. SIGTERM, a
    cluster's way to end a job, is like Ctrl-C.

    Args:
        needs_stdout: whether the script is of no use where nobody reads what it prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # tables have letters that not every terminal has
    sys.stderr = _Quiet(sys.stderr)
    if not needs_stdout or sys.stdout is None:
        sys.stdout = _Quiet(sys.stdout)
    # torch names a folder by the user, who may have no name: docker run -u 12345
    os.environ.setdefault("USER", str(os.getuid()))
    signal.signal(signal.SIGTERM, _interrupt)
    # it ends by itself then, and nothing would catch what the signal raises
    atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
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
        line = mendable(error)
        if line is None:
            raise
        sys.exit(f"error: {line}")


def _interrupt(*_: Any) -> None:
    # while an error ends the process already, a second one would only hide it
    if sys.exc_info()[0] is None:
        raise KeyboardInterrupt


def and_more(texts: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first of the texts, and how many more there are."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return f"{separator.join(texts[:most])}{more}"


def first_line(error: Exception) -> str:
    """The first line of an error's message; if that is empty, the error's kind."""
    return str(error).partition("\n")[0] or type(error).__name__


def mendable(error: Exception) -> str | None:
    """What to tell the user of an error; None if only a programmer can mend it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        package = PACKAGES.get(error.name, str(error.name)).replace("_", "-")
        text = REQUIREMENTS.read_text() if REQUIREMENTS.exists() else ""
        listed = {*re.findall(r"^[\w-]+", text, re.MULTILINE), *PACKAGES.values()}
        # anybody may have given that name to a package of his own
        if package not in listed:
            return f"there is no Python module {error.name}: start where it lies, or install it"
        mend = f"pip install {package} (requirements.txt has the versions)"
        return f"the Python package {package} is missing: {mend}"
    if isinstance(error, OSError) and error.errno not in (None, *OWN_FAULTS):
        mend = "give access, free space or name another"
        return f"cannot read or write {error.filename or 'a file'}: {error.strerror}; {mend}"
    # torch's own error on a CPU is a RuntimeError
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "the machine is out of memory: use a smaller --batch_size or --img_size"
    if type(error).__name__ == "OutOfMemoryError":  # torch.cuda's, without importing torch
        return "the GPU is out of memory: use a smaller --batch_size"
    return None


def _excepthook(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    elif issubclass(kind, ModuleNotFoundError):
        print(f"error: {mendable(error)}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _excepthook
"""For what ends a script while it still imports: it imports this file first."""
