"""The optimizer step, as fast as the device allows, on one device or several. Knows neither data sets nor models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.backends.pytorch import full_precision
from utils.training import ranks as distributed

WARM_UP = 0.05  # of all steps
EAGER_STEPS = 3  # before a CUDA graph is recorded: they tune cuDNN, compile, and allocate the optimizer's state


class Step:
    """Forward, backward and update for one batch; the loss and the hits are summed up on the device.

    On a GPU: bf16 autocast, channels-last, `torch.compile` if asked for, and after a few steps the whole step is one CUDA
    graph (Gray et al., "Getting Started with CUDA Graphs", 2019) that the host only launches. The CPU runs the same code
    without any of it. A change of the model's mode needs a new `Step`.

    Args:
        model: in the mode it shall train in, on the device.
        optimizer: its learning rates become tensors on a GPU, so that the recorded step reads them.
        sharpness: if not 0, the update is by the gradient at a worse place close by (SAM; Foret et al., 2021,
            arXiv:2010.01412): every kernel and matrix moved up its gradient by this share of its own length. A share of
            each layer's length, not of all together, as Haas et al. (2024, arXiv:2411.00075) recommend. Twice the time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        label_smoothing: float,
        compiled: bool,
        sharpness: float = 0.0,
    ):
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.matrices = [p for p in self.parameters if p.ndim > 1]
        self.buffers = list(model.buffers())  # running statistics are those of the place itself
        self.sharpness = sharpness
        self.forward = torch.compile(model) if compiled else model
        self.optimizer, self.label_smoothing = optimizer, label_smoothing
        self.loss_sum, self.hits = (torch.zeros((), device=self.device) for _ in range(2))
        self.count, self.steps, self.graph = 0, 0, None
        for group in optimizer.param_groups if self.on_gpu else ():
            group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of each group, times the group's "scale" if it has one."""
        for group in self.optimizer.param_groups:
            scaled = rate * group.get("scale", 1.0)
            if self.on_gpu:
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images (B, 3, H, W) float32 and labels (B,) int64; B stays the same from the first call on."""
        self.count += len(labels)
        self.steps += 1
        if not self.on_gpu:
            self._run(images, labels)
            return
        if self.steps == 1:
            self.images, self.labels = (
                torch.empty_like(images, memory_format=torch.channels_last),
                torch.empty_like(labels),
            )
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
        loss, logits = self._gradient(images, labels)
        if self.sharpness:
            moved = [t.detach() for t in (*self.matrices, *self.buffers)]
            before = [t.clone() for t in moved]
            with torch.no_grad():
                for p in self.matrices:
                    p.add_(p.grad * (self.sharpness * p.norm() / p.grad.norm().clamp_min(1e-12)))
            self.optimizer.zero_grad()
            self._gradient(images, labels)
            torch._foreach_copy_(moved, before)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_sum += loss * len(labels)
        self.hits += (logits.argmax(1) == labels).sum()

    def _gradient(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradient of the loss, over all ranks, in the parameters; the loss and the logits, detached."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        loss.backward()
        if distributed.active():
            distributed.average([p.grad for p in self.parameters])
        return loss.detach(), logits.detach()

    def totals(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent since the last call, over all ranks; waits for the device."""
        sums = torch.stack([self.loss_sum, self.hits]) / self.count
        if distributed.active():
            distributed.average([sums])
        self.loss_sum.zero_(), self.hits.zero_()
        self.count = 0
        loss, accuracy = sums.tolist()
        return loss, 100 * accuracy


def make_schedule(lr: float, num_epochs: int, lrdt: int | None) -> Callable[[float], float]:
    """Learning rate as a function of the epochs done so far, a fraction included.

    With `lrdt`, a tenth every `lrdt` epochs; otherwise up for a twentieth of the run and then down to 0, both in a line.
    """

    def decayed(epochs: float) -> float:
        return lr * 0.1 ** (int(epochs) // lrdt)

    def triangular(epochs: float) -> float:
        progress = epochs / num_epochs
        return lr * min(0.01 + 0.99 * progress / WARM_UP, (1 - progress) / (1 - WARM_UP))

    return decayed if lrdt else triangular


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent, in evaluation mode, over batches of images (B, 3, H, W) and labels (B,)."""
    model.eval()
    with full_precision():
        logits, labels = map(
            torch.cat, zip(*((model(images), labels) for images, labels in batches), strict=True)
        )
    return F.cross_entropy(logits, labels).item(), 100 * (
        logits.argmax(1) == labels
    ).double().mean().item()


def freeze_batch_norm(model: nn.Module) -> None:
    """Let BatchNorm use its running statistics and no longer update them; its scale and shift still train."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
