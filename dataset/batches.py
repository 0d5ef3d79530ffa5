"""Batches served from device memory: the whole data set lives there as uint8, augmentation runs there batched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 4  # pixels, at most, in each direction
HOLE = (
    3 / 8
)  # of the image's width: side of the square that a training image loses (DeVries and Taylor, 2017)


class Batches:
    """Normalised batches (B, 3, H, W) float32 and labels (B,) int64 on `device`.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        mean, std: of each channel, in units of the full range.
        augment: random shifts by up to 4 pixels, edges filled with black.
        natural: with `augment`, also mirror half of the images and blank a random square of each.
        share: (rank, ranks): every rank draws the same epoch and serves its part of each batch.
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
        natural: bool = False,
        share: tuple[int, int] = (0, 1),
    ):
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(
            device
        )  # NHWC -> NCHW
        self.labels = torch.from_numpy(labels).to(device)
        self.scale = torch.tensor([1 / (255 * s) for s in std], device=device).reshape(1, 3, 1, 1)
        self.offset = torch.tensor(
            [m / s for m, s in zip(mean, std, strict=True)], device=device
        ).reshape(1, 3, 1, 1)
        self.batch_size = min(batch_size, len(images) // share[1] * share[1])
        self.augment, self.natural, self.share = augment, natural, share

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def first(self, count: int) -> Iterator[Tensor]:
        """The first `count` images in batches, for calibration."""
        for start in range(0, min(count, len(self.labels)), self.batch_size):
            yield (
                self.images[start : min(start + self.batch_size, count)] * self.scale - self.offset
            )

    def __len__(self) -> int:
        """Batches in an epoch. Training drops the last, incomplete one: the shuffle leaves out other images each time."""
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.augment or rest == 0 else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: shuffled and augmented with torch's global random state if `augment`, in order otherwise."""
        if self.augment:
            yield from self._augmented_epoch()
            return
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.images[part] * self.scale - self.offset, self.labels[part]

    def _augmented_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The whole epoch's choices are drawn at once; each image is gathered from black-edged originals by row and column."""
        (count, _, height, width), device = self.images.shape, self.device
        order = torch.randperm(count, device=device)
        down, right = (torch.randint(0, 2 * SHIFT + 1, (count, 1), device=device) for _ in range(2))
        rows, columns = (torch.arange(size, device=device) for size in (height, width))
        if self.natural:
            mirrored = torch.rand(count, 1, device=device) < 0.5
            side = round(HOLE * width)
            row, column = (
                torch.randint(0, size, (count, 1), device=device) for size in (height, width)
            )
        padded = (
            F.pad(self.images, [SHIFT] * 4).permute(0, 2, 3, 1).contiguous()
        )  # -> (N, H + 8, W + 8, 3)
        rank, ranks = self.share
        for index in range(len(self)):
            start = index * self.batch_size + rank * (self.batch_size // ranks)
            part = slice(start, start + self.batch_size // ranks)
            from_rows, from_columns = rows + down[part], columns + right[part]  # (B, H), (B, W)
            if self.natural:
                from_columns = torch.where(mirrored[part], from_columns.flip(1), from_columns)
            images = padded[
                order[part, None, None], from_rows[:, :, None], from_columns[:, None, :]
            ]  # (B, H, W, 3)
            images = images.permute(0, 3, 1, 2) * self.scale - self.offset  # (B, 3, H, W)
            if self.natural:
                hit = [
                    (2 * (at - centre[part]) + 1 - side % 2).abs() < side
                    for at, centre in ((rows, row), (columns, column))
                ]
                images = images.masked_fill((hit[0][:, :, None] & hit[1][:, None, :])[:, None], 0.0)
            yield images, self.labels[order[part]]
