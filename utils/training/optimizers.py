"""Optimizers by name. Their state is made of tensors on the device, so that a CUDA graph can record a step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHT_DECAY = 5e-4  # of kernels and matrices; BatchNorm parameters and biases do not decay
REST = 2.0  # Muon's rate for what it does not orthogonalise, as a multiple of its rate for kernels


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """One of "sgd" (Nesterov momentum 0.9), "adamw" and "muon"; the rates are 0 until they are set.

    A group's key "scale" is what its rate is multiplied by.
    """
    fused = next(model.parameters()).is_cuda
    if name == "muon":
        kernels = [
            m.weight
            for m in model.modules()
            if isinstance(m, nn.Conv2d) and m.bias is None and m.groups == 1
        ]
        chosen = {id(kernel) for kernel in kernels}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        return Muon(
            [
                {"params": kernels, "scale": 1.0},
                {"params": rest, "scale": REST, "orthogonal": False},
            ]
        )
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=fused, capturable=fused)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, fused=fused)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict, but for how the optimizer runs: that is for this device to say, not for the one it was saved on."""
    own = [
        {key: group[key] for key in ("fused", "capturable") if key in group}
        for group in optimizer.param_groups
    ]
    groups = [{**group, **kept} for group, kept in zip(state["param_groups"], own, strict=True)]
    optimizer.load_state_dict(
        {**state, "param_groups": groups}
    )  # which says where a count of steps is to be


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz iterations (Jordan et al., "Muon", 2024), for kernels before a BatchNorm.

    Such a kernel's length does not change what the network computes, so it is fixed, here to the square root of the number
    of output channels; the rate is then relative to the kernel, and there is no weight decay (Jordan, airbench94, 2024).
    Groups with `orthogonal` False are trained by plain SGD with Nesterov momentum.
    """

    def __init__(self, groups: list[dict], momentum: float = 0.9):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "orthogonal": True})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers, gradients = (
                [self.state[p]["momentum_buffer"] for p in parameters],
                [p.grad for p in parameters],
            )
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = torch._foreach_add(gradients, torch._foreach_mul(buffers, group["momentum"]))
            if group["orthogonal"]:
                torch._foreach_mul_(
                    parameters, [len(p) ** 0.5 / p.norm().clamp_min(1e-7) for p in parameters]
                )
                updates = orthogonalised(updates)
            torch._foreach_sub_(parameters, torch._foreach_mul(updates, group["lr"]))


def orthogonalised(kernels: list[Tensor], iterations: int = 5) -> list[Tensor]:
    """Each kernel (O, I, H, W), as a matrix (O, I H W), with its singular values moved to about 1.

    The quintic iteration and its coefficients are those of Jordan et al. (2024); bf16 is enough for it. Matrices with
    equally many rows go through it together, the shorter ones filled up with zeros, which it keeps.
    """
    matrices = [kernel.reshape(len(kernel), -1).bfloat16() for kernel in kernels]
    matrices = [
        matrix if len(matrix) <= matrix.shape[1] else matrix.mT for matrix in matrices
    ]  # none is taller than wide
    by_rows: dict[int, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_rows.setdefault(len(matrix), []).append(index)
    result = list(kernels)
    for indices in by_rows.values():
        width = max(matrices[i].shape[1] for i in indices)
        x = torch.stack(
            [F.pad(matrices[i], (0, width - matrices[i].shape[1])) for i in indices]
        )  # (n, rows, width)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(iterations):
            gram = x @ x.mT
            x = torch.baddbmm(
                x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
            )
        for i, matrix in zip(indices, x, strict=True):
            matrix = matrix[:, : matrices[i].shape[1]]
            tall = kernels[i][0].numel() < len(kernels[i])
            result[i] = (
                (matrix.mT if tall else matrix).to(kernels[i].dtype).reshape(kernels[i].shape)
            )
    return result
