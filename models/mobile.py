"""MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381) and EfficientNet-B0 (Tan & Le, 1905.11946).

Both are torchvision's classes, so names and shapes of the parameters are torchvision's too. What
differs: each addition, multiplication and pool is a module, which can be selected for quantization.

The stem "cifar" leaves out the first two of the five halvings, as is usual for CIFAR: the last
feature map of a 32x32 image has 4x4 pixels, as in a ResNet with that stem, instead of one. Strides
have no weights, so ImageNet's weights fit either stem.

This file takes seconds to import, because torchvision does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import efficientnet, mobilenetv2
from torchvision.ops import SqueezeExcitation

from layers import Add, Mul

DROPOUT = 0.2
STOCHASTIC_DEPTH = 0.0
"""torchvision drops blocks too, for ImageNet's hundreds of epochs: ours are few."""


class InvertedResidual(mobilenetv2.InvertedResidual):
    """1x1 convolution to more channels, depthwise 3x3, 1x1 to few, and the shortcut."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.use_res_connect:
            self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.add(out, x) if self.use_res_connect else out


class MobileNetV2(mobilenetv2.MobileNetV2):
    """(N, 3, H, W) normalised images -> (N, num_classes) logits."""

    def __init__(self, num_classes: int, stem: str):
        super().__init__(num_classes, block=InvertedResidual)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        fit_strides(self, stem)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = torch.flatten(x, 1)  # (N, C, 1, 1) -> (N, C)
        return self.classifier(x)


class SqueezeExcite(SqueezeExcitation):
    """Every channel times a factor of all channels' means (Hu et al., 2018, arXiv:1709.01507)."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.mul = Mul()

    def forward(self, x: Tensor) -> Tensor:
        return self.mul(self._scale(x), x)


class MBConv(efficientnet.MBConv):
    """An inverted residual with squeeze and excitation before its last convolution."""

    def __init__(self, *args: Any):
        super().__init__(*args, se_layer=SqueezeExcite)
        if self.use_res_connect:
            self.add = Add()

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        return self.add(self.stochastic_depth(out), x) if self.use_res_connect else out


class EfficientNetB0(efficientnet.EfficientNet):
    """(N, 3, H, W) normalised images -> (N, num_classes) logits."""

    def __init__(self, num_classes: int, stem: str):
        # expansion, kernel, stride, channels in and out, blocks
        stages = (
            (1, 3, 1, 32, 16, 1),
            (6, 3, 2, 16, 24, 2),
            (6, 5, 2, 24, 40, 2),
            (6, 3, 2, 40, 80, 3),
            (6, 5, 1, 80, 112, 3),
            (6, 5, 2, 112, 192, 4),
            (6, 3, 1, 192, 320, 1),
        )
        configs = [efficientnet.MBConvConfig(*stage, block=MBConv) for stage in stages]
        super().__init__(
            configs,
            dropout=DROPOUT,
            stochastic_depth_prob=STOCHASTIC_DEPTH,
            num_classes=num_classes,
        )
        # torchvision's range, 1 / sqrt(num_classes), is too wide for ten
        self.classifier[1].reset_parameters()
        fit_strides(self, stem)


def fit_strides(model: nn.Module, stem: str) -> None:
    """With the stem "cifar", give the first two convolutions of stride 2 the stride 1, in place.

    They are the stem itself and a depthwise one.
    """
    if stem != "cifar":
        return
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if conv.stride == (2, 2)]
    for conv in strided[:2]:
        conv.stride = (1, 1)
