"""Files that are either whole or absent, and folders that are new."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.errors import UserError

PARTIAL = ".partial"


def user_path(text: str) -> Path:
    """A path as a flag has it; `~` is the user's home, also where no shell expands it."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  Path's raises for `~nobody`


def real_path(path: Path) -> Path:
    """`path` with links followed. Unlike `Path.resolve`, it takes a link to itself."""
    return Path(os.path.realpath(path))


def regular(path: Path) -> Path:
    """`path` itself; raises OSError for a FIFO or the like: to read that may wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a file", str(path))
    return path


def sha256(path: Path) -> str:
    """Tells a file's content from any other."""
    digest = hashlib.sha256()
    with regular(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _draft_folder(parent: Path, target: Path) -> Iterator[Path]:
    """A folder that no other process has the name of, so that no planted link is in it.

    Args:
        target: what is made in it, for the message where that fails.
    """
    prefix = f".{target.name[:99]}."
    try:
        folder = tempfile.TemporaryDirectory(PARTIAL, prefix, parent, ignore_cleanup_errors=True)
        with folder as draft:
            yield Path(draft)
    except OSError as error:
        # a write to a full disk does not name its file, and the folder is gone
        if error.filename is None or PARTIAL in str(error.filename):
            error.filename = str(target)
        raise


@contextmanager
def atomic_path(path: Path, follow_link: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it if the block succeeds, deleted if it fails.

    Args:
        follow_link: the user named `path`. If it is a link, what that points to is replaced, and
            what is no file, such as /dev/null, is written to. Elsewhere a link is replaced itself:
            a folder from elsewhere must not decide what is written to.

    Raises:
        OSError: the file cannot be written (full disk, no permission); what was at `path` before
            is still there.
    """
    if follow_link:
        path = real_path(path)
        if path.exists() and not path.is_file() and not path.is_dir():
            # a FIFO that nobody reads fails here, where plain opening would wait for ever
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb"):
                yield path
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _draft_folder(path.parent, path) as draft:
        partial = draft / path.name
        yield partial
        partial.replace(path)


def blocking_folder(path: Path) -> Path | None:
    """What keeps `atomic_path` from writing what a user named, a folder or a file in its place.

    None: nothing does.
    """
    path = real_path(path)
    if path.exists() and not path.is_file():
        # a device is written to, not replaced
        return None
    nearest = next(folder for folder in path.parents if folder.exists())
    return None if nearest.is_dir() and os.access(nearest, os.W_OK) else nearest


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
    with _draft_folder(folder, folder) as draft:
        yield draft
        (folder / last).unlink(missing_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == last):
            path.replace(folder / path.name)


@contextmanager
def locked(folder: Path, make: bool = False) -> Iterator[None]:
    """Context manager: no other process can have `folder` locked.

    What killed ones left is deleted.

    Args:
        make: it is made if it is not there, and deleted in the end if it is empty; so are the
            folders above it that were made for it.

    Raises:
        UserError: another process has it locked.
    """
    made = []
    if make:
        made = [folder, *(path for path in folder.parents if not path.exists())]
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            # the system gives up a killed process's lock
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            what = f"another process is at work in {folder}"
            raise UserError(f"{what}: wait for it, or name another folder") from None
        except OSError:  # Lustre and NFS may have no locks
            print(f"{folder} cannot be locked: let no other process use it", file=sys.stderr)
        for path in folder.glob(f".*{PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)
        yield
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()  # fails unless it is empty
        os.close(handle)


def new_folder(parent: Path, name: str) -> Path:
    """Create `parent/name`, or the first of `name_1`, `name_2`, ... that does not exist yet."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parent / (f"{name}_{number}" if number else name)
        number += 1
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
