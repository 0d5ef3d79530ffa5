"""Batches served from device memory: the whole data set lives there as uint8, augmentation runs there batched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 4  # pixels, at most, in each direction


class Batches:
    """Normalised batches (B, 3, H, W) float32 and labels (B,) int64 on `device`.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        mean, std: of each channel, in units of the full range.
        augment: random shifts by up to 4 pixels (edges filled with black), and mirroring where `flip` allows it.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: list[float],
        std: list[float],
        batch_size: int,
        device: torch.device,
        augment: bool = False,
        flip: bool = False,
    ):
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(device)  # NHWC -> NCHW
        self.labels = torch.from_numpy(labels).to(device)
        self.scale = (1 / (255 * torch.tensor(std, device=device))).reshape(1, 3, 1, 1)
        self.offset = (torch.tensor(mean, device=device) / torch.tensor(std, device=device)).reshape(1, 3, 1, 1)
        self.batch_size = min(batch_size, len(images))
        self.augment, self.flip = augment, flip

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def first(self, count: int) -> Iterator[Tensor]:
        """The first `count` images in batches, for calibration."""
        for start in range(0, min(count, len(self.labels)), self.batch_size):
            yield self.images[start : min(start + self.batch_size, count)] * self.scale - self.offset

    def __len__(self) -> int:
        """Batches in an epoch. Training drops the last, incomplete one: the shuffle leaves out other images each time."""
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.augment or rest == 0 else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: shuffled and augmented with torch's global random state if `augment`, in order otherwise."""
        order = torch.randperm(len(self.labels), device=self.device) if self.augment else None
        for index in range(len(self)):
            chosen = slice(index * self.batch_size, (index + 1) * self.batch_size)
            chosen = chosen if order is None else order[chosen]
            images = self._augmented(self.images[chosen]) if self.augment else self.images[chosen]
            yield images * self.scale - self.offset, self.labels[chosen]

    def _augmented(self, images: Tensor) -> Tensor:
        """Shifted and mirrored copies of uint8 images (B, 3, H, W), each by its own amount."""
        count, _, height, width = images.shape
        rows = torch.arange(height, device=self.device) + torch.randint(
            0, 2 * SHIFT + 1, (count, 1), device=self.device
        )  # (B, H)
        columns = torch.arange(width, device=self.device) + torch.randint(0, 2 * SHIFT + 1, (count, 1), device=self.device)
        if self.flip:
            columns = torch.where(torch.rand(count, 1, device=self.device) < 0.5, columns.flip(1), columns)
        batch = torch.arange(count, device=self.device)[:, None, None]
        padded = F.pad(images, [SHIFT] * 4).permute(0, 2, 3, 1)  # (B, 3, H, W) -> (B, H + 8, W + 8, 3)
        return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # -> (B, 3, H, W)
