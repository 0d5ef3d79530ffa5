"""A training's folder: what is written after each epoch, and how a run goes on from there."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from utils import checkpoint as ckpt
from utils.checkpoint import Checkpoint
from utils.errors import UserError, first_line
from utils.files import locked
from utils.training import ranks
from utils.training.optimizers import load_optimizer

BEST = "ckpt_best"


@dataclass
class Run:
    """Everything that training changes, and what is needed to write it down.

    An epoch's files are written by a thread, beside the next epoch: on a GPU they would take a
    quarter of the time. `close` waits for it.

    Args:
        base: a checkpoint's constant part; its state and progress are filled in at each `save`.
        epoch: how many are completed.
        keep: of how many last epochs the checkpoints stay.
    """

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    base: Checkpoint
    epoch: int = 0
    best_val_loss: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)
    keep: int = 1

    def __post_init__(self) -> None:
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    @property
    def best(self) -> Path:
        """The checkpoint of the epoch with the lowest loss on the val part."""
        return self.folder / BEST

    def require_finite(self, loss: float, lr: float) -> None:
        """Raises UserError if the epoch's loss or a weight is not finite any more.

        The line names the last good checkpoint.
        """
        if math.isfinite(loss) and all(p.isfinite().all() for p in self.model.parameters()):
            return
        self.wait()
        left = "no checkpoint was written yet"
        last = self.folder / f"ckpt_{self.epoch}"
        if last.exists():
            left = f"the last good checkpoint is {last}"
        what = f"the loss or a weight is not finite any more in epoch {self.epoch + 1}"
        raise UserError(f"{what}: use a lower --lr than {lr:g}; {left}")

    def finish_epoch(
        self, loss: float, train_pct: float, val_loss: float, val_pct: float, write: bool
    ) -> None:
        """One epoch more: into the history, and to disk if this rank is to `write`."""
        self.epoch += 1
        past = {"loss": loss, "train_accuracy_pct": train_pct}
        past |= {"val_loss": val_loss, "val_accuracy_pct": val_pct}
        self.history.append(past)
        if write:
            self.save(val_loss)

    def save(self, val_loss: float) -> None:
        """Write `ckpt_<epochs completed>`, and `ckpt_best` if no earlier loss on val was lower.

        The loss on the val part is less noisy than the accuracy. What is written is the state of
        this moment, whatever training changes later; `wait` returns once it is on disk.

        Raises:
            OSError: the files of the save before could not be written.
        """
        self.wait()
        best = val_loss <= self.best_val_loss
        if best:
            self.best_val_loss = val_loss
        checkpoint = replace(
            self.base,
            state=_copied_to_cpu(self.model.state_dict()),
            optimizer=_copied_to_cpu(self.optimizer.state_dict()),
            epoch=self.epoch,
            best_val_loss=self.best_val_loss,
            history=list(self.history),
        )
        self._writing = self._writer.submit(self._write, checkpoint, best)

    def _write(self, checkpoint: Checkpoint, best: bool) -> None:
        ckpt.save(self.folder / f"ckpt_{checkpoint.epoch}", checkpoint)
        if best:
            self._write_best(checkpoint)
        for epoch, path in ckpt.by_epoch(self.folder).items():
            if epoch <= checkpoint.epoch - self.keep:
                path.unlink()

    def _write_best(self, checkpoint: Checkpoint) -> None:
        """Write `ckpt_best`: half the size, since it is no place to resume from."""
        ckpt.save(self.best, replace(checkpoint, optimizer=None))

    def wait(self) -> None:
        """Until what was saved is on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._writing:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Write what was saved, and let go of the thread; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def go_on(self, checkpoint: Checkpoint, write: bool) -> None:
        """Take over the optimizer's state and the progress of a checkpoint.

        Args:
            write: whether this rank is to write `ckpt_best` where a killed process did not, or a
                copied checkpoint came without.

        Raises:
            UserError: the optimizer's state is of another network or optimizer.
        """
        load_optimizer(self.optimizer, checkpoint.optimizer)
        self.epoch = checkpoint.epoch
        self.history = checkpoint.history
        best = checkpoint.best_val_loss
        last = self.history[-1]["val_loss"] if self.history else best
        self.best_val_loss = best if self.best.exists() else last
        # killed between the two files of an epoch, a run has no ckpt_best of its last one
        if write and last == self.best_val_loss:
            self._write_best(checkpoint)


def _copied_to_cpu(state: Any) -> Any:
    """A copy of a state dict in the CPU's memory; training goes on to change the original."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), state)


def load_to_resume(path: Path) -> Checkpoint:
    """The newest checkpoint of a run's folder, or the one at `path` itself.

    Raises:
        UserError: it is not train.py's, the run went on from there, or it is a `ckpt_best`.
    """
    newest = ckpt.latest(path)
    checkpoint = ckpt.load_whole(newest)
    there = ckpt.by_epoch(newest.parent)
    last = max(there, default=0)
    if last > checkpoint.epoch:
        raise UserError(f"--resume {newest}: the run went on to {there[last]}; resume that")
    if checkpoint.optimizer is None:
        mend = "resume the last ckpt_<epoch>, or start from it with --load_ckpt"
        raise UserError(f"--resume {path}: it holds no optimizer state; {mend}")
    return checkpoint


@contextmanager
def at_work_in(folder: Path, first: bool, named: str | None) -> Iterator[None]:
    """Context manager: no other process trains in `folder`, which goes if it is empty in the end.

    Args:
        first: whether this is the rank that writes.
        named: the network, as the user named it.

    Raises:
        UserError: another process does; or this one is interrupted, and how to go on.
    """
    try:
        with locked(folder, make=True) if first else nullcontext():
            yield
    except (KeyboardInterrupt, RuntimeError) as error:
        what = _why_it_ended(error)
        if what is None:
            raise
        mend = "nothing was saved yet"
        if any(folder.glob("ckpt_*")):
            mend = f"continue with: {ranks.command(named)} --resume {shlex.quote(str(folder))}"
        raise UserError(f"{what}; {mend}") from None


def _why_it_ended(error: KeyboardInterrupt | RuntimeError) -> str | None:
    """What ended a training from outside; None if it was its own fault."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, torch.AcceleratorError):
        return f"the GPU failed ({first_line(error)})"
    return "another rank has ended" if ranks.lost_another(error) else None
