"""Several processes that train one model, each on its part of every batch.

They talk through torch.distributed and are started by torchrun.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from utils.device import default_device
from utils.errors import UserError, mendable

T = TypeVar("T")

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
            f"the ranks did not meet ({str(error).splitlines()[0]}): start them by torchrun or, "
            f"for a plain process, unset {', '.join(TORCHRUN)}"
        ) from None
    here = Ranks(dist.get_rank(), dist.get_world_size(), device)
    try:
        if here.first:
            yield here
        else:
            with redirect_stdout(io.StringIO()):
                yield here
    except (UserError, RuntimeError) as error:
        lost = isinstance(error, RuntimeError) and lost_another(error)
        if not lost and not isinstance(error, UserError):
            raise
        # what is wrong with flags or files is so for all ranks of a host: one says it
        if os.environ["LOCAL_RANK"] != "0":
            sys.exit(1)
        if lost:
            raise UserError("another rank has ended") from None
        raise
    finally:
        dist.destroy_process_group()


def active() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized()


def lost_another(error: RuntimeError) -> bool:
    """Whether an error is this rank's for want of another one."""
    return active() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def command() -> str:
    """How train.py was started, for hints."""
    if not active():
        return "python train.py"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', 'N')} train.py"


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


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, all in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = flat.split([tensor.numel() for tensor in tensors])
    for tensor, mean in zip(tensors, means, strict=True):
        tensor.copy_(mean.reshape(tensor.shape))


def share_model(model: nn.Module) -> None:
    """Start every rank from rank 0's weights; every BatchNorm sees all ranks' batches; in place."""
    if not active():
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm


class SyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over all ranks' batches: N ranks train what one does at the same global batch.

    torch's own needs a GPU; this one runs on gloo too.
    """

    estimating = False
    """Set by `utils.training.step.estimate_batch_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        # while statistics are estimated every rank sees the same images
        if not self.training or self.estimating:
            return super().forward(x)
        x32 = x.float()
        world_size, rank = dist.get_world_size(), dist.get_rank()

        # every rank's variance and mean: each adds its own to a table of zeros
        own = torch.stack(torch.var_mean(x32, (0, 2, 3), correction=0))  # (2, C)
        table = F.pad(own[None], (0, 0, 0, 0, rank, world_size - 1 - rank))  # (world_size, 2, C)
        variances, means = all_reduce(table).unbind(1)  # (world_size, C) each

        # Var[x] = E[Var[x | rank]] + Var[E[x | rank]]; as E[x^2] - E[x]^2 it could be negative
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)

        with torch.no_grad():
            count = x.numel() // len(mean) * world_size
            unbiased = variance * (count / (count - 1))
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)

        factor = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * factor
        return (x32 * factor[:, None, None] + shift[:, None, None]).to(x.dtype)
