"""ResNet-18/34/50 (He et al., 2016, arXiv:1512.03385), with parameters named as in torchvision.

As in torchvision, the stride of a bottleneck sits in its 3x3 convolution ("ResNet v1.5").
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layers import Add


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in, H, W) -> (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu(_residual_sum(self.add, x, identity, self.downsample))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut.

    (N, in, H, W) -> (N, 4 width, H/stride, W/stride).
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu(_residual_sum(self.add, x, identity, self.downsample))


class ResNet(nn.Module):
    """(N, 3, H, W) normalised images -> (N, num_classes) logits.

    Args:
        block: BasicBlock or Bottleneck.
        depths: number of blocks in each of the four stages.
        stem: "imagenet" (7x7 convolution of stride 2 and a max pool: 32x32 images enter the stages
            at 8x8) or "cifar" (3x3 convolution: they enter at 32x32).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: tuple[int, ...],
        num_classes: int,
        stem: str,
    ):
        super().__init__()
        # stem
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        # stages: each doubles the channels, and all but the first halve the image
        channels = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                shortcut = _shortcut(channels, width * block.expansion, stride)
                blocks.append(block(channels, width, stride, shortcut))
                channels = width * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        # classifier
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.avgpool(x), 1)  # (N, C, 1, 1) -> (N, C)
        return self.fc(x)


def _residual_sum(add: Add, x: Tensor, identity: Tensor, downsample: nn.Module | None) -> Tensor:
    """The sum of a block's output `x` and its shortcut, both of one shape.

    The convolution that computes the first operand of `add` also adds: that of the shortcut where
    there is one. TensorRT's kernels that add are slower than those that do not, and a 1x1
    convolution has the least to lose.
    """
    if downsample is None:
        return add(x, identity)
    return add(downsample(identity), x)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )
