"""Float networks by name. None of them knows of quantization: `utils.quantization.swap` quantizes any of them afterwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from models.resnet import BasicBlock, Bottleneck, ResNet
from models.vanilla_cnn import VanillaCNN
from utils.checkpoint import load_weights
from utils.errors import UserError

CLASSIFIERS = ("fc.", "classifier.")  # how the names of a last layer's parameters begin


def _mobile(name: str) -> Callable[[int, str], nn.Module]:
    def builder(classes: int, stem: str) -> nn.Module:
        from models import mobile  # seconds, which who trains a ResNet need not wait for

        return getattr(mobile, name)(classes, stem)

    return builder


MODELS: dict[str, Callable[[int, str], nn.Module]] = {
    "vanilla_cnn": lambda classes, stem: VanillaCNN(classes),
    "resnet18": lambda classes, stem: ResNet(BasicBlock, (2, 2, 2, 2), classes, stem),
    "resnet34": lambda classes, stem: ResNet(BasicBlock, (3, 4, 6, 3), classes, stem),
    "resnet50": lambda classes, stem: ResNet(Bottleneck, (3, 4, 6, 3), classes, stem),
    "mobilenet_v2": _mobile("MobileNetV2"),
    "efficientnet_b0": _mobile("EfficientNetB0"),
}
"""Name -> builder of (number of classes, stem "imagenet" or "cifar")."""


def build(name: str, num_classes: int, stem: str) -> nn.Module:
    """A freshly initialised float network.

    Raises:
        UserError: no model of that name.
    """
    if name not in MODELS:
        raise UserError(f"no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name](num_classes, stem)


def load_imagenet_weights(model: nn.Module, name: str) -> None:
    """Load torchvision's ImageNet weights into everything but the classifier, which keeps its initialisation.

    Looks in TORCH_HOME first, then downloads.

    Raises:
        UserError: no such weights, no network, a damaged file, or a network whose parameters are not torchvision's.
    """
    from torchvision.models import get_model_weights, list_models

    try:
        weights = get_model_weights(name).DEFAULT
    except ValueError:
        known = ", ".join(model for model in MODELS if model in list_models())
        raise UserError(
            f"--pretrain: torchvision has no ImageNet weights for {name}, but for {known}"
        ) from None
    try:
        state = weights.get_state_dict(progress=True)
        state = {key: value for key, value in state.items() if not key.startswith(CLASSIFIERS)}
    except (
        Exception
    ) as error:  # the network's errors, and whatever torch.load raises on a damaged file
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--pretrain: cannot download {weights.url} or read what was downloaded ({reason}); put that file into "
            f"{torch.hub.get_dir()}/checkpoints, or train without --pretrain"
        ) from None
    state |= {
        key: value for key, value in model.state_dict().items() if key.startswith(CLASSIFIERS)
    }
    try:
        load_weights(model, state)
    except UserError as error:
        raise UserError(f"--pretrain: {error}; use --stem imagenet") from None
