"""Several processes that train one model, each on its part of every batch, through torch.distributed (started by torchrun)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's rank among `count`, and its device."""

    rank: int
    count: int
    device: torch.device


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started, over NCCL on GPUs and gloo on CPUs; a plain process is rank 0 of 1."""
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        yield Ranks(0, 1, torch.device("cuda" if gpu else "cpu"))
        return
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def active() -> bool:
    return dist.is_available() and dist.is_initialized()


def from_first(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    values = [value]
    if active():
        dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, all in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(
        tensors, flat.div_(dist.get_world_size()).split([t.numel() for t in tensors]), strict=True
    ):
        tensor.copy_(mean.reshape(tensor.shape))


def share_model(model: nn.Module) -> None:
    """Start every rank from rank 0's weights, and let every BatchNorm see the batches of all ranks; in place."""
    if not active():
        return
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = RankedBatchNorm2d


class RankedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, so that N ranks train what one process would at the same global batch.

    torch's SyncBatchNorm needs a GPU; this one runs on gloo too.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32, ranks = x.float(), dist.get_world_size()
        own = torch.stack(torch.var_mean(x32, (0, 2, 3), correction=0))  # (2, C)
        before = dist.get_rank()
        variances, means = all_reduce(
            F.pad(own[None], (0, 0, 0, 0, before, ranks - 1 - before))
        ).unbind(1)  # (ranks, C)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(
            0
        )  # the square's mean less the mean's square could be negative
        with torch.no_grad():
            count = x.numel() // len(mean) * ranks
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        factor = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * factor
        return (x32 * factor[:, None, None] + shift[:, None, None]).to(x.dtype)
