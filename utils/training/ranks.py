"""Several processes that train one model, each on its part of every batch.

They talk through torch.distributed and are started by torchrun.
"""

from __future__ import annotations

import io
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.device import default_device
from utils.errors import UserError, first_line, mendable
from utils.specs import runs_code

T = TypeVar("T")

MESSAGE = 4_000_000
"""Least values of a message of gradients: smaller ones pay latency, larger ones overlap less with
the backward pass."""

GRACE_S = 10.0
"""How long a rank that is told to end may take, before it is taken for one that waits for ever."""

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells every process that it starts."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `world_size`, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0


@contextmanager
def started() -> Iterator[Ranks]:
    """The ranks that torchrun started, over NCCL on GPUs and gloo on CPUs; the first alone prints.

    A plain process is rank 0 of 1.
    """
    device = default_device()
    # some of these alone are what another program left behind
    if not all(name in os.environ for name in TORCHRUN):
        yield Ranks(0, 1, device)
        return
    try:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the ranks did not meet ({first_line(error)}): start them by torchrun or, "
            f"for a plain process, unset {', '.join(TORCHRUN)}"
        ) from None
    here = Ranks(dist.get_rank(), dist.get_world_size(), device)
    silent = nullcontext() if here.first else redirect_stdout(io.StringIO())
    with _ending_while_waiting():
        try:
            with silent:
                yield here
        except (UserError, RuntimeError) as error:
            if isinstance(error, RuntimeError):
                if not lost_another(error):
                    raise
                error = UserError("another rank has ended")
            # what is wrong with flags or files is so for all ranks of a host: one says it
            if os.environ["LOCAL_RANK"] != "0":
                sys.exit(1)
            raise error from None
        finally:
            dist.destroy_process_group()


@contextmanager
def _ending_while_waiting() -> Iterator[None]:
    """Context manager: a signal to end is obeyed even where the main thread waits for ever.

    Where a rank dies, torchrun sends the others SIGTERM. Python acts on a signal between two of its
    instructions, and a main thread that waits for NCCL, which waits for the dead, gets to none. But
    the signal's number comes out of a pipe at once, and other threads go on.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    done = threading.Event()

    def end() -> None:
        os.read(reader, 1)  # of a signal; nothing, once the pipe is closed
        os.close(reader)
        if done.wait(GRACE_S):
            return
        if os.environ["LOCAL_RANK"] == "0":
            what = "told to end, but still waiting for a rank that may be gone"
            print(f"\nerror: {what}; go on with --resume and the run's folder", file=sys.stderr)
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(-1)
        os.close(writer)


def active() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized()


def lost_another(error: RuntimeError) -> bool:
    """Whether an error is this rank's for want of another one."""
    return active() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def command(named: str | None) -> str:
    """How train.py was started, for hints.

    Args:
        named: the network, as the user named it: one that runs code is to be named again.
    """
    script = sys.argv[0] if Path(sys.argv[0]).name == "train.py" else "train.py"
    words = ["python", script]
    if active():
        count = os.environ.get("LOCAL_WORLD_SIZE", "N")
        words = ["torchrun", f"--nproc_per_node={count}", script]
    if named and runs_code(named):
        words += ["--model", named]
    return shlex.join(words)


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, which alone does it, on every rank.

    Raises:
        UserError: on every rank, what a user can mend of its failure.
    """
    if not active():
        return work()
    # result, error
    outcome = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = mendable(error)
            if outcome[1] is None:
                raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def world_size() -> int:
    return dist.get_world_size() if active() else 1


def rank() -> int:
    return dist.get_rank() if active() else 0


def gather(part: Tensor) -> Tensor:
    """All ranks' parts (n, ...), one after the other: (world_size n, ...)."""
    if not active():
        return part
    parts = part.new_empty(world_size() * len(part), *part.shape[1:])
    dist.all_gather_into_tensor(parts, part)
    return parts


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, all in one message."""
    if not active():
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    _copy_back(flat / world_size(), tensors)


def average_statistics(model: nn.Module) -> None:
    """Every BatchNorm's running statistics become the mean of those of the ranks, in place."""
    statistics = []
    for norm in norms_with_statistics(model):
        statistics += [norm.running_mean, norm.running_var]
    if statistics:
        average(statistics)


def norms_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.track_running_stats]


def _copy_back(flat: Tensor, tensors: list[Tensor]) -> None:
    parts = flat.split([tensor.numel() for tensor in tensors])
    shaped = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(tensors, shaped)


class GradientSum:
    """Adds up the ranks' gradients in a few messages, while the backward pass goes on.

    `finish` has to follow each backward pass.
    """

    def __init__(self, parameters: list[nn.Parameter]):
        self._ready: list[Tensor] = []
        self._sent: list[tuple[dist.Work, Tensor, list[Tensor]]] = []
        self._hooks = [p.register_post_accumulate_grad_hook(self._note) for p in parameters]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, p: nn.Parameter) -> None:
        self._ready.append(p.grad)
        if sum(gradient.numel() for gradient in self._ready) >= MESSAGE:
            self._send()

    def _send(self) -> None:
        flat = torch.cat([gradient.reshape(-1) for gradient in self._ready])
        self._sent.append((dist.all_reduce(flat, async_op=True), flat, self._ready))
        self._ready = []

    def finish(self) -> None:
        """Wait until every gradient is the sum."""
        if self._ready:
            self._send()
        for work, flat, gradients in self._sent:
            work.wait()
            _copy_back(flat, gradients)
        self._sent = []


def share_model(model: nn.Module, sync_batchnorm: bool) -> nn.Module:
    """Start every rank from rank 0's weights.

    Args:
        sync_batchnorm: BatchNorm's statistics are those of all ranks' batches, by torch's own
            SyncBatchNorm. Otherwise each rank has its own.

    Raises:
        UserError: torch's would leave out what a BatchNorm of another library also computes.
    """
    if not active():
        return model
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    if sync_batchnorm:
        for name, module in model.named_modules():
            if isinstance(module, _BatchNorm) and type(module).forward is not _BatchNorm.forward:
                kind = type(module).__name__
                raise UserError(f"--sync_batchnorm: {name} is a {kind}, not torch's: drop it")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model
