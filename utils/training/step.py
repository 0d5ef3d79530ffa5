"""The optimizer step, as fast as the device allows, on one device or several.

Knows neither data sets nor models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layers.normalize import logits_of
from utils.device import full_precision, tuned_convolutions
from utils.errors import UserError, first_line
from utils.metrics import percent_equal
from utils.training import kernels, ranks

EAGER_STEPS = 3
"""Before a CUDA graph is recorded: they tune cuDNN, compile kernels and allocate state."""


class Step:
    """Forward, backward and update for one batch; loss and hits are summed up on the device.

    On a GPU: bf16 autocast, channels-last, and after a few steps the whole step is one CUDA graph
    (Gray et al., "Getting Started with CUDA Graphs", 2019) that the host only launches. The CPU
    runs the same code without any of it. A change of the model's mode needs a new `Step`.

    Args:
        model: on the device; its mode stays the same while it steps.
        optimizer: its learning rates become tensors on a GPU, so that the recorded step reads them.
        sam_rho: if not 0, the update is by the gradient at a worse place close by (SAM; Foret et
            al., 2021, arXiv:2010.01412): every kernel and matrix moved up its gradient by this
            share of its own length. A share of each layer's length, not of all together, as Haas
            et al. (2024, arXiv:2411.00075) recommend. It takes twice the time.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        label_smoothing: float,
        sam_rho: float = 0.0,
    ):
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.model = model
        self.optimizer = optimizer
        self.label_smoothing = label_smoothing
        self.sam_rho = sam_rho
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.gradient_sum = ranks.GradientSum(self.parameters) if ranks.active() else None
        # SAM perturbs matrices only; buffers, such as running statistics and the count of batches
        # in them, stay those of the unperturbed weights
        self.matrices = [p for p in self.parameters if p.ndim > 1]
        # (nobody can write into an expanded one)
        self.buffers = [b for b in model.buffers() if 0 not in b.stride()]

        self.loss_sum = torch.zeros((), device=self.device)
        self.hits = torch.zeros((), device=self.device)
        self.count = 0  # images since `totals`
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.on_gpu:
            for group in optimizer.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32, device=self.device)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of each group, times the group's "scale" if it has one."""
        for group in self.optimizer.param_groups:
            scaled = lr * group.get("scale", 1.0)
            if self.on_gpu:
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images (B, 3, H, W) float32 and labels (B,) int64; B stays the same."""
        self.count += len(labels)
        self.steps += 1
        if not self.on_gpu:
            self._run(images, labels)
            return

        # a recorded step reads from where the batch was while it was recorded
        if self.steps == 1:
            self.images = torch.empty_like(images, memory_format=torch.channels_last)
            self.labels = torch.empty_like(labels)
        self.images.copy_(images)
        self.labels.copy_(labels)

        if self.steps <= EAGER_STEPS:
            self._run(self.images, self.labels)
            return
        if self.graph is None:
            self._record()
        self.graph.replay()

    def _record(self) -> None:
        """Record the step without running it.

        Raises:
            UserError: the network does what no recorded step can repeat.
        """
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self._run(self.images, self.labels)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"the step cannot be recorded as a CUDA graph ({first_line(error)}): the "
                "network's forward reads a value off the GPU or makes a tensor of Python numbers; "
                "make that a buffer"
            ) from None

    def _run(self, images: Tensor, labels: Tensor) -> None:
        with tuned_convolutions():
            loss, logits = self._gradient(images, labels)
            if self.sam_rho:
                self._sharpness_aware_gradient(images, labels)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss_sum += loss * len(labels)
        self.hits += (logits.argmax(1) == labels).sum()

    def _gradient(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the loss's gradient, over all ranks, in the parameters; the loss and the logits."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.on_gpu)
        with autocast, kernels.fusing():
            # a copy: the first layer may work in place, and SAM runs twice
            logits = logits_of(self.model(images.clone()))
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        # the ranks' gradients are added up
        (loss / ranks.world_size()).backward()
        if self.gradient_sum:
            self.gradient_sum.finish()
        # parameters of auxiliary heads, whose results nobody reads here
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return loss.detach(), logits.detach()

    def _sharpness_aware_gradient(self, images: Tensor, labels: Tensor) -> None:
        """Replace the gradient here by that at the end of a short step up the hill (SAM)."""
        weights = [p.detach() for p in self.matrices]
        # copies, in few kernels, which take tensors of one type
        moved = defaultdict(list)
        for tensor in (*weights, *self.buffers):
            moved[tensor.dtype].append(tensor.detach())
        before = [torch._foreach_mul(tensors, 1) for tensors in moved.values()]

        # rho |p| / |g| for each matrix
        gradients = [p.grad for p in self.matrices]
        steepness = torch._foreach_norm(gradients)
        torch._foreach_clamp_min_(steepness, 1e-12)
        lengths = torch._foreach_div(torch._foreach_norm(weights), steepness)
        torch._foreach_mul_(lengths, self.sam_rho)
        steps = torch._foreach_mul(gradients, lengths)
        torch._foreach_add_(weights, steps)

        self.optimizer.zero_grad()
        self._gradient(images, labels)
        for tensors, copies in zip(moved.values(), before, strict=True):
            torch._foreach_copy_(tensors, copies)

    def close(self) -> None:
        """Let go of what other code holds: NCCL would wait for ever for a recorded step to go."""
        self.graph = None
        if self.gradient_sum:
            self.gradient_sum.close()

    def totals(self) -> tuple[float, float]:
        """Mean loss and accuracy in percent since the last call, over all ranks.

        Waits for the device.
        """
        means = torch.stack([self.loss_sum, self.hits]) / self.count
        ranks.average([means])
        self.loss_sum.zero_()
        self.hits.zero_()
        self.count = 0
        loss, accuracy = means.tolist()
        return loss, 100 * accuracy


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent, in evaluation mode.

    Args:
        batches: images (B, 3, H, W) and labels (B,).
    """
    model.eval()
    logits, labels = [], []
    with full_precision():
        for batch, batch_labels in batches:
            logits.append(logits_of(model(batch)))
            labels.append(batch_labels)
    logits, labels = torch.cat(logits), torch.cat(labels)
    loss = F.cross_entropy(logits, labels).item()
    return loss, percent_equal(logits.argmax(1), labels)


@torch.no_grad()
def estimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Replace BatchNorm's running averages by the averages over one pass, all images alike.

    A running average begins with what it was initialised to, and lags behind weights that change
    fast: after few steps it describes a network that never was.
    """
    norms = ranks.norms_with_statistics(model)
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    model.train()
    seen = 0
    for images, _ in batches:
        # one image has no variance where it is a single pixel
        if len(images) == 1:
            continue
        seen += len(images)
        for norm in norms:
            norm.momentum = len(images) / seen
        model(images)
    for norm, (momentum, batches_tracked) in zip(norms, kept, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(batches_tracked)


def freeze_batch_norm(model: nn.Module) -> None:
    """Let BatchNorm use its running statistics and no longer update them.

    Its scale and shift still train.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
