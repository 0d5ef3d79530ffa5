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
    """A temporary path beside `path`, renamed to it if the block succeeds and deleted if it fails.

    A link stays one, to the new content; what is no file, such as /dev/null, is written to as it is.

    Raises:
        OSError: the file cannot be written (full disk, no permission); what was at `path` before is still there.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        if error.filename in (None, str(partial)):  # a write to a full disk does not name its file
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):  # which would hide the block's own
            partial.unlink(missing_ok=True)


@contextmanager
def staged(folder: Path, voucher: str) -> Iterator[Path]:
    """A temporary folder whose files move to `folder`, which exists, if the block succeeds; if not, those there stay.

    The file `voucher`, which vouches for all others, goes first and comes last: there is none if the move is cut short.

    Raises:
        OSError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=folder) as name:
            yield Path(name)
            (folder / voucher).unlink(missing_ok=True)
            for path in sorted(Path(name).iterdir(), key=lambda path: path.name == voucher):
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
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a killed process's ends with it
        except BlockingIOError:
            raise UserError(
                f"another process is at work in {folder}: wait for it, or name another folder"
            ) from None
        yield
    finally:
        os.close(handle)


def link(source: Path, path: Path) -> None:
    """Let `path` be the file `source` too, atomically; a copy where the file system has no hard links."""
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
