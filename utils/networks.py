"""Names and checkpoints to networks: float, calibrated and fine-tuned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import models
from models import foreign
from utils.checkpoint import Checkpoint, State, load_weights, without_ranges
from utils.errors import UserError, mendable
from utils.specs import OWN_STEM, NetworkSpec, Quantization, is_foreign

if TYPE_CHECKING:
    from dataset.batches import Batches


def require_known(name: str, stem: str) -> None:
    """Raises UserError unless there is a model of that name with that stem."""
    foreign_name = is_foreign(name)
    if not foreign_name and name not in models.MODELS:
        known = ", ".join(models.MODELS)
        raise UserError(f"no model {name!r}; there are {known}, and {foreign.FORMS}")
    if foreign_name and stem != OWN_STEM or name in models.STEMLESS and stem != "cifar":
        raise UserError(f"--stem {stem}: {name} has no other stem than its own; drop the flag")


def build_float(spec: NetworkSpec, size: tuple[int, int]) -> nn.Module:
    """The float network, freshly initialised, with modules for its functional operations.

    Args:
        size: height and width of the images that it is for.

    Raises:
        UserError: no such model, or one from elsewhere cannot be built.
    """
    from utils.quantization.modularize import modularize
    from utils.quantization.watch import example_images

    require_known(spec.name, spec.stem)
    model = models.build(spec.name, spec.num_classes, spec.stem)
    example = example_images(*size)
    if is_foreign(spec.name):
        _require_logits(model, example, spec)
    for name, reason in modularize(model, example).items():
        print(f"{name or 'the network'}: its functional operations stay float, {reason}")
    return model


def _require_logits(model: nn.Module, images: Tensor, spec: NetworkSpec) -> None:
    """Raises UserError unless a network from elsewhere makes logits (N, classes) of images.

    Args:
        images: (N, 3, H, W), normalised.
    """
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # it is anyone's code
        if mendable(error):
            raise
        height, width = images.shape[2:]
        text = f"--m {spec.name}: it fails on images of {height}x{width}"
        raise UserError(f"{text}: {type(error).__name__}: {error}") from None
    model.train(training)
    expected = (len(images), spec.num_classes)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != expected:
        raise UserError(
            f"--m {spec.name}: of {len(images)} images it makes {found}, not logits {expected}: "
            "it must obey num_classes= and return a single tensor"
        )


def build_quantized(
    spec: NetworkSpec,
    quantization: Quantization,
    size: tuple[int, int],
    state: State | None = None,
) -> nn.Module:
    """The same with the selected layers in their training forms, ranges not calibrated.

    Args:
        state: weights and ranges that are to be loaded: additions round what these say.
    """
    from utils.quantization.swap import follow_ranges, swap_layers
    from utils.quantization.watch import example_images

    model = build_float(spec, size)
    example = example_images(*size)
    swap_layers(model, example, quantization.quant_layers, quantization.skip_layers)
    follow_ranges(model, state or {})
    return model


def calibrate_model(model: nn.Module, quantization: Quantization, batches: Batches) -> None:
    """Calibrate with the first images of `batches`, a train part without augmentation."""
    from utils.quantization.calibrate import calibrate

    calibrate(model, batches.first(quantization.calib_images), quantization.calibrator)


def load_imagenet_weights(model: nn.Module, name: str) -> None:
    """Load torchvision's ImageNet weights into everything but the classifier.

    Looks in TORCH_HOME first, then downloads. The classifier keeps its initialisation.

    Raises:
        UserError: no such weights, no network, a damaged file, or a network whose parameters are
            not torchvision's.
    """
    from torchvision.models import get_model_weights, list_models

    try:
        weights = get_model_weights(name.removeprefix("torchvision/")).DEFAULT
    except ValueError:
        known = ", ".join(model for model in models.MODELS if model in list_models())
        raise UserError(
            f"--pretrain: torchvision has no ImageNet weights for {name}, but for {known}"
        ) from None
    try:
        pretrained = weights.get_state_dict(progress=True)
    except Exception as error:  # the network's errors, and whatever torch.load raises on damage
        reason = getattr(error, "reason", error)
        raise UserError(
            f"--pretrain: cannot download {weights.url} or read what was downloaded ({reason}); "
            f"put that file into {torch.hub.get_dir()}/checkpoints, or train without --pretrain"
        ) from None
    try:
        load_weights(model, pretrained, new_classifier=True)
    except UserError as error:
        hint = "" if is_foreign(name) else "; use --stem imagenet"
        raise UserError(f"--pretrain: {error}{hint}") from None


def restore(
    checkpoint: Checkpoint,
    wanted: Sequence[str],
    quantization: Quantization,
    batches: Batches,
) -> dict[str, nn.Module]:
    """The networks, by precision, that a checkpoint holds or that calibration makes of it.

    A float checkpoint gives FP32 and, calibrated here, INT8-PTC. A quantized one holds the float
    weights and ranges it started from, and so gives all three.

    Args:
        wanted: precisions; FP32 comes in any case.
        batches: of the train part, which also say the device.
    """
    quantized = checkpoint.quantization is not None
    start = checkpoint.ptq_state if quantized else checkpoint.state
    spec = checkpoint.network

    size = tuple(checkpoint.data.img_size)

    networks = {"FP32": build_float(spec, size)}
    load_weights(networks["FP32"], without_ranges(start))

    if "INT8-PTC" in wanted:
        model = build_quantized(spec, quantization, size, start)
        load_weights(model, start, allow_missing_ranges=not quantized)
        model.to(batches.device)
        if not quantized:
            calibrate_model(model, quantization, batches)
        networks["INT8-PTC"] = model

    if "INT8-QAT" in wanted and quantized:
        model = build_quantized(spec, quantization, size, checkpoint.state)
        load_weights(model, checkpoint.state)
        networks["INT8-QAT"] = model

    for network in networks.values():
        network.to(batches.device)
    return networks
