"""A plain convolutional network, the smallest model that shows the whole recipe."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VanillaCNN(nn.Module):
    """Six 3x3 convolutions in three stages, each of which halves the image.

    (N, 3, H, W) normalised images -> (N, num_classes) logits.
    """

    def __init__(self, num_classes: int):
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 128, 256):
            for _ in range(2):
                layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))  # (N, 256, 1, 1)
        return self.fc(torch.flatten(x, 1))
