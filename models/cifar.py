"""torchvision's networks with first layers that suit CIFAR's small images.

ResNet (He et al., 2016, arXiv:1512.03385), MobileNetV2 (Sandler et al., 2018, arXiv:1801.04381) and
EfficientNet-B0 (Tan & Le, 2019, arXiv:1905.11946), all (N, 3, H, W) normalised images -> (N,
num_classes) logits. The stem "imagenet" is torchvision's network as it is. With the stem "cifar"
the last feature map of a 32x32 image has 4x4 pixels instead of one. Names of the parameters are
torchvision's with either.
"""

from __future__ import annotations

from torch import nn


def resnet(name: str, num_classes: int, stem: str) -> nn.Module:
    """The stem "cifar" is one 3x3 convolution: 32x32 images enter the stages at 32x32, not 8x8."""
    from torchvision import models  # takes a second, which only those wait for who need it

    model = getattr(models, name)(num_classes=num_classes)
    if stem == "cifar":
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def mobilenet_v2(num_classes: int, stem: str) -> nn.Module:
    from torchvision import models

    model = models.mobilenet_v2(num_classes=num_classes)
    fit_strides(model, stem)
    return model


def efficientnet_b0(num_classes: int, stem: str) -> nn.Module:
    from torchvision import models

    # torchvision drops blocks too, for ImageNet's hundreds of epochs: ours are few
    model = models.efficientnet_b0(num_classes=num_classes, stochastic_depth_prob=0.0)
    # torchvision's range, 1 / sqrt(num_classes), is too wide for ten
    model.classifier[1].reset_parameters()
    fit_strides(model, stem)
    return model


def fit_strides(model: nn.Module, stem: str) -> None:
    """With the stem "cifar", give the first two convolutions of stride 2 the stride 1, in place.

    They are the stem itself and a depthwise one. Strides have no weights, so ImageNet's weights fit
    either stem.
    """
    if stem != "cifar":
        return
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if conv.stride == (2, 2)]
    for conv in strided[:2]:
        conv.stride = (1, 1)
