"""Batches served from device memory: a whole data set lives there as bytes and is augmented there.

CIFAR-10 takes 150 MB so. Every image of a batch is augmented by itself, but by the same few
operations on the whole batch: no worker processes, nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from utils.errors import UserError

MAX_SHIFT = 4
"""Pixels that a training image moves at most in each direction."""
CUTOUT = 3 / 8
"""Side of the square that a training image loses, as share of its width (arXiv:1708.04552)."""


class Batches:
    """Normalised batches (B, 3, H, W) float32 and labels (B,) int64 on `device`.

    Args:
        images: (N, H, W, 3) uint8.
        labels: (N,) int64.
        normalize: makes (B, 3, H, W) float32 of (B, H, W, 3) uint8; it is moved to `device`.
        augment: random shifts by up to 4 pixels, edges filled with black; shuffled.
        mirror_and_cutout: with `augment`, also mirror half of the images and cut a square out of
            each at a random place (DeVries and Taylor, 2017, arXiv:1708.04552).
        rank, world_size: every rank draws the same epoch and serves its own part of each batch.

    Raises:
        UserError: fewer images than ranks, or none.
    """

    def __init__(
        self,
        images: np.ndarray | Tensor,
        labels: np.ndarray | Tensor,
        normalize: nn.Module,
        batch_size: int,
        device: torch.device,
        augment: bool = False,
        mirror_and_cutout: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        if len(images) < world_size:
            raise UserError(f"{len(images)} images cannot be shared by {world_size} ranks")
        # no copy of tensors that are there already
        self.images = torch.as_tensor(images, device=device).contiguous()
        self.labels = torch.as_tensor(labels, device=device)
        self.normalize = normalize.to(device)
        # at most all images, of which each rank has equally many
        self.batch_size = min(batch_size, len(images) // world_size * world_size)
        self.augment = augment
        self.mirror_and_cutout = mirror_and_cutout
        self.rank = rank
        self.world_size = world_size

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def first(self, count: int) -> Iterator[Tensor]:
        """The first `count` images (B, 3, H, W) in batches, for calibration."""
        for images in self.images[:count].split(self.batch_size):
            yield self.normalize(images)

    def __len__(self) -> int:
        """Batches in an epoch.

        Training drops the last, incomplete one: the shuffle leaves out other images each time.
        """
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.augment or rest == 0 else full + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch: in order, or shuffled and augmented with torch's global random state."""
        if self.augment:
            yield from self._augmented_epoch()
            return
        images, labels = self.images.split(self.batch_size), self.labels.split(self.batch_size)
        for batch_images, batch_labels in zip(images, labels, strict=True):
            yield self.normalize(batch_images), batch_labels

    def _augmented_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, height, width, _ = self.images.shape
        # Every random choice of an epoch; their order decides what a seed means: keep it. All ranks
        # draw the whole epoch, so that together they serve what one process would.
        order = torch.randperm(count, device=self.device)
        # where each pixel of an image lies in the original, (N, H) and (N, W)
        rows = self._shifted(height)
        columns = self._shifted(width)
        if self.mirror_and_cutout:
            # a mirrored image reads its columns from right to left
            mirrored = torch.rand(count, 1, device=self.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
            cut_rows = self._cutout(height)
            cut_columns = self._cutout(width)

        # what lies beside the original is black
        black_rows = (rows < 0) | (rows >= height)
        black_columns = (columns < 0) | (columns >= width)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        served = self.batch_size // self.world_size
        for index in range(len(self)):
            start = index * self.batch_size + self.rank * served
            part = slice(start, start + served)
            # (B, 1, 1), (B, H, 1) and (B, 1, W) broadcast: one index of each for every pixel
            pixels = order[part, None, None], rows[part, :, None], columns[part, None, :]
            black = black_rows[part, :, None, None] | black_columns[part, None, :, None]
            images = self.images[pixels].masked_fill_(black, 0)  # (B, H, W, 3)
            images = self.normalize(images)  # (B, 3, H, W)
            if self.mirror_and_cutout:
                cut = cut_rows[part, None, :, None] & cut_columns[part, None, None, :]
                images = images.masked_fill(cut, 0.0)
            yield images, self.labels[order[part]]

    def _shifted(self, size: int) -> Tensor:
        """Rows or columns of all images, each image's moved by its own shift, (N, size)."""
        places = torch.arange(-MAX_SHIFT, size - MAX_SHIFT, device=self.device)
        return self._integers(2 * MAX_SHIFT + 1) + places

    def _integers(self, limit: int) -> Tensor:
        """(N, 1) random ones below `limit`."""
        return torch.randint(0, limit, (len(self.labels), 1), device=self.device)

    def _cutout(self, size: int) -> Tensor:
        """Which of `size` rows or columns each image loses, (N, size) bool.

        The square's centre is in the image; it may reach over the edge.
        """
        side = round(CUTOUT * self.images.shape[2])
        first = self._integers(size) - side // 2
        at = torch.arange(size, device=self.device)
        return (at >= first) & (at < first + side)
