"""Float networks by name. None of them knows of quantization: `utils.quantization` adds that."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from models.resnet import BasicBlock, Bottleneck, ResNet
from models.vanilla_cnn import VanillaCNN

STEMLESS = ("vanilla_cnn",)
"""Models with one kind of first layers, which counts as CIFAR's stem."""

CLASSIFIERS = ("fc.", "classifier.")
"""How the names of a last layer's parameters begin."""


def _mobile(name: str) -> Callable[[int, str], nn.Module]:
    def builder(num_classes: int, stem: str) -> nn.Module:
        # takes seconds, for which nobody who trains a ResNet need wait
        from models import mobile

        return getattr(mobile, name)(num_classes, stem)

    return builder


MODELS: dict[str, Callable[[int, str], nn.Module]] = {
    "vanilla_cnn": lambda num_classes, stem: VanillaCNN(num_classes),
    "resnet18": lambda num_classes, stem: ResNet(BasicBlock, (2, 2, 2, 2), num_classes, stem),
    "resnet34": lambda num_classes, stem: ResNet(BasicBlock, (3, 4, 6, 3), num_classes, stem),
    "resnet50": lambda num_classes, stem: ResNet(Bottleneck, (3, 4, 6, 3), num_classes, stem),
    "mobilenet_v2": _mobile("MobileNetV2"),
    "efficientnet_b0": _mobile("EfficientNetB0"),
}
"""Name -> builder of (number of classes, stem "imagenet" or "cifar")."""


def build(name: str, num_classes: int, stem: str) -> nn.Module:
    """A freshly initialised float network, one of `MODELS`."""
    return MODELS[name](num_classes, stem)
