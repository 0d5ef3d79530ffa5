"""Names and checkpoints to networks: float, calibrated and fine-tuned ones."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dataset
import models
from dataset.batches import Batches
from layers import Normalize
from models import foreign
from utils.backends.network import EVALUATION_BATCH
from utils.checkpoint import Checkpoint, State, load_weights, without_ranges
from utils.device import default_device, memory_format
from utils.errors import UserError, mendable
from utils.quantization.calibrate import calibrate
from utils.quantization.modularize import modularize_or_say
from utils.quantization.swap import follow_ranges, swap_layers
from utils.quantization.watch import example_images, run_on
from utils.specs import OWN_STEM, DataSpec, NetworkSpec, Quantization, is_foreign


def require_known(name: str, stem: str) -> None:
    """Raises UserError unless there is a model of that name with that stem."""
    foreign_name = is_foreign(name)
    if not foreign_name and name not in models.MODELS:
        known = ", ".join(models.MODELS)
        raise UserError(f"no model {name!r}; there are {known}, and {foreign.FORMS}")
    if (foreign_name and stem != OWN_STEM) or (name in models.STEMLESS and stem != "cifar"):
        raise UserError(f"--stem {stem}: {name} has no other stem than its own; drop the flag")


def build_float(spec: NetworkSpec, size: tuple[int, int]) -> nn.Module:
    """The float network, freshly initialised, with modules for its functional operations.

    Args:
        size: height and width of the images that it is for.

    Raises:
        UserError: no such model, or one from elsewhere cannot be built.
    """
    require_known(spec.name, spec.stem)
    model = models.build(spec.name, spec.num_classes, spec.stem)
    example = example_images(*size)
    if is_foreign(spec.name):
        _require_usable(model, spec)
        _require_logits(model, example, spec)
    modularize_or_say(model, example)
    return model


def _require_usable(model: nn.Module, spec: NetworkSpec) -> None:
    """Raises UserError if a network from elsewhere could be trained, but not saved or exported."""
    for name, module in model.named_modules():
        what = ""
        if isinstance(module, torch.jit.ScriptModule):
            what = "is TorchScript"
        elif hasattr(module, "_orig_mod"):
            what = "is made by torch.compile"
        if what:
            what += ", which cannot be rewritten: use the module it was made of"
            raise UserError(f"--m {spec.name}: {name or 'the network'} {what}")
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(f"--m {spec.name}: its state has {name}, which is no tensor; drop it")


def _require_logits(model: nn.Module, images: Tensor, spec: NetworkSpec) -> None:
    """Raises UserError unless a network from elsewhere makes logits (N, classes) of images.

    Args:
        images: (N, 3, H, W), normalised.
    """
    try:
        # as they will lie in memory, where not every `view` of maps will do
        wanted = memory_format(default_device(), model)
        logits = run_on(model, images.to(memory_format=wanted))
    except Exception as error:  # it is anyone's code
        if mendable(error):
            raise
        size = "x".join(map(str, images.shape[2:]))
        what = f"it fails on images of {size}: {type(error).__name__}: {error}"
        raise UserError(f"--m {spec.name}: {what}") from None
    expected = (len(images), spec.num_classes)
    found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if found != expected:
        what = f"of {len(images)} images it makes {found}, not logits {expected}"
        mend = "it must obey num_classes= and return a single tensor"
        raise UserError(f"--m {spec.name}: {what}: {mend}")


def build_quantized(
    spec: NetworkSpec, quantization: Quantization, size: tuple[int, int], state: State | None = None
) -> nn.Module:
    """The same with the selected layers in their training forms, ranges not calibrated.

    Args:
        state: weights and ranges that are to be loaded: additions round what these say.
    """
    model = build_float(spec, size)
    example = example_images(*size)
    swap_layers(model, example, quantization.quant_layers, quantization.skip_layers)
    follow_ranges(model, state or {})
    return model


def calibrate_model(model: nn.Module, quantization: Quantization, batches: Batches) -> None:
    """Calibrate with the first images of `batches`, a train part without augmentation."""
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
        what = f"torchvision has no ImageNet weights for {name}, but for {known}"
        raise UserError(f"--pretrain: {what}") from None
    try:
        pretrained = weights.get_state_dict(progress=True)
    except Exception as error:  # the network's errors, and whatever torch.load raises on damage
        reason = getattr(error, "reason", error)
        what = f"cannot download {weights.url} or read what was downloaded ({reason})"
        mend = f"put that file into {torch.hub.get_dir()}/checkpoints, or train without --pretrain"
        raise UserError(f"--pretrain: {what}; {mend}") from None
    try:
        load_weights(model, pretrained, new_classifier=True)
    except UserError as error:
        hint = "" if is_foreign(name) else "; use --stem imagenet"
        raise UserError(f"--pretrain: {error}{hint}") from None


def require_exportable(model: nn.Module, data: DataSpec) -> None:
    """Raises UserError if a network could be trained, but not exported afterwards.

    Args:
        model: float, or calibrated.
    """
    from utils.quantization.export import export_onnx  # onnx, which training does not need

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "fp32.onnx", data.size, data.mean, data.std)


def batches_of(
    images: np.ndarray, labels: np.ndarray, info: DataSpec, batch_size: int = EVALUATION_BATCH
) -> Batches:
    """Images (N, H, W, 3) uint8 and labels (N,) in batches, as a network sees them."""
    normalize = Normalize(info.mean, info.std)
    return Batches(images, labels, normalize, batch_size, default_device())


def restore(
    checkpoint: Checkpoint,
    data: dataset.ImageData,
    quantization: Quantization,
    wanted: Sequence[str],
) -> tuple[Quantization, dict[str, nn.Module]]:
    """How a checkpoint is quantized, and its networks by precision.

    A float checkpoint gives FP32 and INT8-PTC, which is calibrated here on the checkpoint's own
    train images, as far as there are any. A quantized one holds the float weights and ranges it
    started from, and so gives all three.

    Args:
        wanted: precisions; FP32 comes in any case.

    Raises:
        UserError: the checkpoint does not fit its networks.
    """
    spec, info, device = checkpoint.network, checkpoint.data, default_device()
    states = {"INT8-PTC": checkpoint.ptq_state, "INT8-QAT": checkpoint.state}
    calibration = None
    # a float checkpoint has no ranges yet
    if checkpoint.quantization is None:
        states = {"INT8-PTC": checkpoint.state}
        (images, labels), _ = data.split(info.split_seed)
        count = min(quantization.calib_images, len(images))
        quantization = replace(quantization, calib_images=count)
        calibration = batches_of(images[:count], labels[:count], info)

    model = build_float(spec, info.size)
    load_weights(model, without_ranges(states["INT8-PTC"]))
    networks = {"FP32": model.to(device)}
    for precision, state in states.items():
        if precision not in wanted:
            continue
        model = build_quantized(spec, quantization, info.size, state)
        load_weights(model, state, allow_missing_ranges=calibration is not None)
        networks[precision] = model.to(device)
        if calibration is not None:
            calibrate_model(model, quantization, calibration)
    return quantization, networks
