"""Float networks by name. None of them knows of quantization: `utils.quantization` adds that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from models import foreign
from models.cifar import efficientnet_b0, mobilenet_v2, resnet
from models.vanilla_cnn import VanillaCNN

STEMLESS = ("vanilla_cnn",)
"""Models with one kind of first layers, which counts as CIFAR's stem."""

MODELS: dict[str, Callable[[int, str], nn.Module]] = {
    "vanilla_cnn": lambda num_classes, stem: VanillaCNN(num_classes),
    "resnet18": partial(resnet, "resnet18"),
    "resnet34": partial(resnet, "resnet34"),
    "resnet50": partial(resnet, "resnet50"),
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_b0": efficientnet_b0,
}
"""Name -> builder of (number of classes, stem "imagenet" or "cifar")."""


def require(name: str) -> None:
    """Raises UserError unless `build` knows a network of that name."""
    if name not in MODELS:
        foreign.find(name)


def build(name: str, num_classes: int, stem: str) -> nn.Module:
    """A freshly initialised float network, one of `MODELS` or from elsewhere (`models.foreign`).

    Raises:
        UserError: one from elsewhere cannot be built.
    """
    if name in MODELS:
        return MODELS[name](num_classes, stem)
    return foreign.build(name, num_classes)
