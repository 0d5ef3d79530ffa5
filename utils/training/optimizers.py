"""Optimizers by name. Their state is tensors on the device: a CUDA graph can record a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.errors import UserError

WEIGHT_DECAY = 5e-4  # of kernels and matrices; BatchNorm parameters and biases do not decay
MOMENTUM = 0.9
SGD_SCALE = 2.0  # Muon's rate for what it does not orthogonalise, as a multiple of its rate
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration by Jordan et al. (2024)."""


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """One of "sgd" (Nesterov momentum), "adamw" and "muon"; the rates are 0 until they are set.

    A group's key "scale" is what its rate is multiplied by.
    """
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda
    if name == "muon":
        kernels = []
        for module in model.modules():
            # one before a BatchNorm, as its missing bias tells
            if isinstance(module, nn.Conv2d) and module.bias is None and module.groups == 1:
                kernels.append(module.weight)
        orthogonal = {id(kernel) for kernel in kernels}
        rest = [p for p in parameters if id(p) not in orthogonal]
        groups = [
            {"params": kernels, "scale": 1.0},
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
        fits = all(_fits(p, values) for p, values in optimizer.state.items())
    except (AttributeError, KeyError, TypeError, ValueError):  # torch checks little, and late
        fits = False
    if not fits:
        raise UserError("the checkpoint's optimizer state does not fit; start with --load_ckpt")


def _fits(p: Tensor, values: dict[str, Tensor]) -> bool:
    """Whether an optimizer's tensors are a parameter's: of its shape, but for a count of steps."""
    return all(value.ndim == 0 or value.shape == p.shape for value in values.values())


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
            if parameters:
                self._step_group(parameters, group)

    def _step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        # momentum, and Nesterov's look ahead: gradient + momentum * buffer
        gradients = [p.grad for p in parameters]
        buffers = []
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers.append(self.state[p]["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        ahead = torch._foreach_mul(buffers, group["momentum"])
        updates = torch._foreach_add(gradients, ahead)

        # kernels get their length back, and a step whose directions are all equally long
        if group["orthogonal"]:
            scales = [len(p) ** 0.5 / p.norm().clamp_min(1e-7) for p in parameters]
            torch._foreach_mul_(parameters, scales)
            updates = newton_schulz(updates)
        torch._foreach_sub_(parameters, torch._foreach_mul(updates, group["lr"]))


def newton_schulz(kernels: list[Tensor], iterations: int = 5) -> list[Tensor]:
    """Each kernel (O, I, H, W), as a matrix (O, I H W), with its singular values moved to about 1.

    bf16 is enough for it. Matrices with equally many rows go through it together.
    """
    # no matrix is taller than wide: the products below are then the smaller ones
    matrices = []
    by_rows: dict[int, list[int]] = {}
    for index, kernel in enumerate(kernels):
        matrix = kernel.reshape(len(kernel), -1).bfloat16()
        if len(matrix) > matrix.shape[1]:
            matrix = matrix.mT
        matrices.append(matrix)
        by_rows.setdefault(len(matrix), []).append(index)

    result = list(kernels)
    for indices in by_rows.values():
        # the shorter ones are filled up with zeros, which the iteration keeps
        width = max(matrices[i].shape[1] for i in indices)
        padded = [F.pad(matrices[i], (0, width - matrices[i].shape[1])) for i in indices]
        stacked = _orthogonalise(torch.stack(padded), iterations)  # (n, rows, width)

        # back to each kernel's own shape
        for i, matrix in zip(indices, stacked, strict=True):
            kernel = kernels[i]
            matrix = matrix[:, : matrices[i].shape[1]]
            if kernel[0].numel() < len(kernel):
                matrix = matrix.mT
            result[i] = matrix.to(kernel.dtype).reshape(kernel.shape)
    return result


def _orthogonalise(x: Tensor, iterations: int) -> Tensor:
    """Newton-Schulz on each of the matrices (n, rows, width).

    A step is x <- a x + (b g + c g^2) x, with g = x x^T. It moves every singular value in (0, 1]
    to about 1; dividing by the Frobenius norm puts them there.
    """
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
