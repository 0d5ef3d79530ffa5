"""The optimizer step, as fast as the device allows, on one device or several. Knows neither data sets nor models."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EAGER_STEPS = 3  # before a CUDA graph is recorded: they tune cuDNN, compile, and allocate the optimizer's state


class Step:
    """Forward, backward and update for one batch; the loss and the hits are summed up on the device.

    On a GPU: bf16 autocast, channels-last, `torch.compile` if asked for, and after a few steps the whole step is one CUDA
    graph (Gray et al., "Getting Started with CUDA Graphs", 2019) that the host only launches. The CPU runs the same code
    without any of it. A change of the model's mode needs a new `Step`.

    Args:
        model: in the mode it shall train in, on the device.
        optimizer: its learning rates become tensors on a GPU, so that the recorded step reads them.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, label_smoothing: float, compiled: bool):
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.forward = torch.compile(model) if compiled else model
        self.optimizer, self.label_smoothing = optimizer, label_smoothing
        self.loss_sum, self.hits = (torch.zeros((), device=self.device) for _ in range(2))
        self.count, self.steps, self.graph = 0, 0, None
        for group in optimizer.param_groups if self.on_gpu else ():
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if self.on_gpu:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images (B, 3, H, W) float32 and labels (B,) int64; B stays the same from the first call on."""
        self.count += len(labels)
        self.steps += 1
        if not self.on_gpu:
            self._run(images, labels)
            return
        if self.steps == 1:
            self.images, self.labels = torch.empty_like(images, memory_format=torch.channels_last), torch.empty_like(labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        if self.steps <= EAGER_STEPS:
            self._run(self.images, self.labels)
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records without running
                self._run(self.images, self.labels)
        self.graph.replay()

    def _run(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        loss.backward()
        if dist.is_initialized():
            average([p.grad for p in self.parameters])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_sum += loss.detach() * len(labels)
        self.hits += (logits.argmax(1) == labels).sum()

    def totals(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent since the last call, over all ranks; waits for the device."""
        sums = torch.stack([self.loss_sum, self.hits]) / self.count
        if dist.is_initialized():
            average([sums])
        self.loss_sum.zero_(), self.hits.zero_()
        self.count = 0
        loss, accuracy = sums.tolist()
        return loss, 100 * accuracy


def join_ranks() -> tuple[int, int, torch.device]:
    """Rank, number of ranks and device of this process: (0, 1, ...) unless `torchrun` started it."""
    gpu = torch.cuda.is_available()
    if "RANK" not in os.environ:
        return 0, 1, torch.device("cuda" if gpu else "cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpu else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, all in one message."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, flat.div_(dist.get_world_size()).split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.reshape(tensor.shape))


class RankedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, so that N ranks train what one process would at the same global batch.

    torch's SyncBatchNorm needs a GPU; this one runs on gloo too.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        moments = torch.stack([x32.mean((0, 2, 3)), x32.square().mean((0, 2, 3))])  # (2, C)
        mean, square = torch.distributed.nn.functional.all_reduce(moments) / dist.get_world_size()
        variance = square - mean.square()
        with torch.no_grad():
            count = x.numel() / len(mean) * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        shape = (1, -1, 1, 1)
        factor = self.weight * torch.rsqrt(variance + self.eps)
        return (x32 * factor.reshape(shape) + (self.bias - mean * factor).reshape(shape)).to(x.dtype)


def share_batch_norm(model: nn.Module) -> None:
    """Let every BatchNorm of `model` see the batches of all ranks, in place; names and parameters stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = RankedBatchNorm2d
