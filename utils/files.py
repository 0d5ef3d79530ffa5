"""Files that are either whole or absent, and folders that are new."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds, deleted if it fails.

    A link stays one, to the new content; what is no file, such as /dev/null, is written to.

    Raises:
        OSError: the file cannot be written (full disk, no permission); what was at `path` before
            is still there.
    """
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        # a write to a full disk does not name its file
        if error.filename in (None, str(partial)):
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # which would hide the block's own
            partial.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path, last: str) -> Iterator[Path]:
    """A temporary folder whose files move to `folder`, which exists, if the block succeeds.

    If it fails, those in `folder` stay.

    Args:
        last: the file that describes all others. It is removed first and moved last: there is
            none if the move is cut short.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
            draft = Path(name)
            yield draft
            (folder / last).unlink(missing_ok=True)
            for path in sorted(draft.iterdir(), key=lambda path: path.name == last):
                path.replace(folder / path.name)
    except OSError as error:
        error.filename = str(folder)  # the temporary one is gone
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Meanwhile no other process can have `folder`, which exists, locked.

    Raises:
        UserError: another one has.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            # the system gives up a killed process's lock
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {folder}: wait for it, or name another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def link(source: Path, path: Path) -> None:
    """Let `path` be the file `source` too, atomically; a copy where there are no hard links."""
    with atomic_path(path) as partial:
        try:
            partial.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, partial)


def new_folder(parent: Path, name: str) -> Path:
    """Create `parent/name`, or the first of `name_1`, `name_2`, ... that does not exist yet."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parent / (f"{name}_{number}" if number else name)
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
