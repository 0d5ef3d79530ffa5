"""The concatenation as a module, so that it can be selected for quantization like a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Cat(nn.Module):
    """Feature maps (N, C1, H, W), (N, C2, H, W), ... -> (N, C1 + C2 + ..., H, W)."""

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=1)
