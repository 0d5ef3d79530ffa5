"""Optimizers by name. Their state is tensors on the device: a CUDA graph can record a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from utils.errors import UserError
from utils.training import kernels, ranks

WEIGHT_DECAY = 5e-4  # SGD's and AdamW's, of kernels and matrices; Muon has none
MOMENTUM = 0.9
SGD_SCALE = 2.0  # Muon's rate for what it does not orthogonalise, as a multiple of its rate
ITERATIONS = 5
ROW_STEP = 64  # matrices whose rows differ by less go through the iteration together
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration by Jordan et al. (2024)."""


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """One of "sgd" (Nesterov momentum), "adamw" and "muon"; the rates are 0 until they are set.

    A group's key "scale" is what its rate is multiplied by.
    """
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda
    if name == "muon":
        filters = {}
        for module in model.modules():
            # one before a BatchNorm, as its missing bias tells
            if isinstance(module, nn.Conv2d) and module.bias is None and module.groups == 1:
                weight = module._parameters.get("weight")
                if weight is not None:  # it is not computed of others
                    filters[id(weight)] = weight
        rest = [p for p in parameters if id(p) not in filters]
        groups = [
            {"params": list(filters.values()), "scale": 1.0},
            {"params": rest, "scale": SGD_SCALE, "orthogonal": False},
        ]
        return Muon(groups, MOMENTUM)

    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=fused, capturable=fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=MOMENTUM, nesterov=True, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, but for how the optimizer runs.

    That is for this device to say, not for the one it was saved on.

    Raises:
        UserError: it is the state of another optimizer or network.
    """
    try:
        groups = []
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
            kept = {key: own[key] for key in ("fused", "capturable") if key in own}
            groups.append({**saved, **kept})
        optimizer.load_state_dict({**state, "param_groups": groups})
        for p, values in optimizer.state.items():
            for key, value in values.items():
                # a GPU has the channels last, a CPU first
                if value.shape == p.shape:
                    values[key] = torch.empty_like(p).copy_(value)
                elif value.ndim > 0:  # no count of steps either
                    raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):  # torch checks little, and late
        mend = "the checkpoint's optimizer state does not fit; start with --load_ckpt"
        raise UserError(mend) from None


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations, for kernels before a BatchNorm.

    After Jordan et al., "Muon" (2024). Such a kernel's length does not change what the network
    computes, so it is fixed, here to the square root of the number of output channels; the rate is
    then relative to the kernel, and there is no weight decay (Jordan, airbench94, 2024). Groups
    with `orthogonal` False are trained by plain SGD with Nesterov momentum.
    """

    def __init__(self, groups: list[dict], momentum: float):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "orthogonal": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            if not parameters:
                continue
            if group["orthogonal"]:
                muon_step(parameters, buffers, group["momentum"], group["lr"])
            else:
                _nesterov(parameters, buffers, group["momentum"], group["lr"])


def _nesterov(
    parameters: list[Tensor], buffers: list[Tensor], momentum: float, lr: Tensor | float
) -> None:
    """A step along gradient + momentum * buffer, in place."""
    gradients = [p.grad for p in parameters]
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, gradients)
    updates = torch._foreach_mul(buffers, momentum)
    torch._foreach_add_(updates, gradients)
    torch._foreach_mul_(updates, lr)
    torch._foreach_sub_(parameters, updates)


def muon_step(
    filters: list[Tensor], buffers: list[Tensor], momentum: float, lr: Tensor | float
) -> None:
    """Give filters (O, I, H, W) their length back, and a step whose directions are equally long.

    Matrices of about equally many rows go through the iteration together, in bf16, which is enough
    for it. Several ranks share them out.
    """
    # what is no matrix product: in fused kernels where they can run
    take_momentum, take_step = nesterov_momentum, rescale_and_step
    if filters[0].is_cuda and kernels.usable():
        from layers import fused_optimizer

        take_momentum = fused_optimizer.nesterov_momentum
        take_step = fused_optimizer.rescale_and_step
    norms = torch._foreach_norm(filters)
    by_rows: dict[int, list[int]] = {}
    for index, weight in enumerate(filters):
        by_rows.setdefault(math.ceil(min(_shape(weight)) / ROW_STEP), []).append(index)

    for indices in by_rows.values():
        # every matrix in a slot of its own, filled up with zeros, which the iteration keeps; the
        # slots beyond them are empty, so that each rank has equally many
        shapes = [sorted(_shape(filters[i])) for i in indices]
        share = math.ceil(len(indices) / ranks.world_size())
        rows, width = (max(sizes) for sizes in zip(*shapes, strict=True))
        count = share * ranks.world_size()
        directions = filters[0].new_zeros(count, rows, width, dtype=torch.bfloat16)
        for slot, i in enumerate(indices):
            out = _view_in_slot(directions[slot], filters[i])
            take_momentum(filters[i].grad, buffers[i], momentum, out)

        # each rank orthogonalises its share of them
        first = share * ranks.rank()
        steps = ranks.gather(newton_schulz(directions[first : first + share]))
        for slot, i in enumerate(indices):
            target_norm = len(filters[i]) ** 0.5
            step = _view_in_slot(steps[slot], filters[i])
            take_step(filters[i], step, lr, norms[i], target_norm)


def _shape(weight: Tensor) -> tuple[int, int]:
    """Of a filter (O, I, H, W) as a matrix (O, I H W)."""
    return len(weight), weight[0].numel()


def _view_in_slot(slot: Tensor, weight: Tensor) -> Tensor:
    """A filter's part (O, I H W) of a slot (rows, width).

    A matrix that is taller than wide lies in it transposed: the iteration's products are then the
    smaller ones.
    """
    rows, width = _shape(weight)
    return slot[:width, :rows].mT if rows > width else slot[:rows, :width]


def _as_matrix(weight: Tensor) -> Tensor:
    """A filter (O, I, H, W) as (O, I H W), its columns in the order of its memory: a view."""
    if weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.view(len(weight), -1)


def nesterov_momentum(gradient: Tensor, buffer: Tensor, momentum: float, out: Tensor) -> None:
    """Let `buffer` take up the gradient (O, I, H, W); into `out`, gradient + momentum * buffer."""
    buffer.mul_(momentum).add_(gradient)
    out.copy_(_as_matrix(buffer.mul(momentum).add_(gradient)))


def rescale_and_step(
    weight: Tensor, step: Tensor, lr: Tensor | float, norm: Tensor, target_norm: float
) -> None:
    """Scale a filter (O, I, H, W) from `norm` to `target_norm`; subtract lr times `step`."""
    weight.mul_(target_norm / norm.clamp_min(1e-7))
    _as_matrix(weight).sub_(step * lr)


def newton_schulz(x: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """Matrices (n, rows, width) with their singular values moved to about 1.

    A step is x <- a x + (b g + c g^2) x, with g = x x^T. It moves every singular value in (0, 1]
    to about 1; dividing by the Frobenius norm puts them there.
    """
    a, b, c = NEWTON_SCHULZ
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
