"""A torch module as a back end."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class TorchNetwork:
    """A module in evaluation mode as a function: images (N, 3, H, W) float32 -> logits (N, classes) float32."""

    name = "pytorch"

    def __init__(self, model: nn.Module, device: torch.device):
        self._model, self._device = model.to(device).eval(), device

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._model(torch.from_numpy(images).to(self._device)).float().cpu().numpy()
