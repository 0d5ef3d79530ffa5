"""Benchmarks: the record that the training one writes, what it compares with, and what it leaves behind."""

import json
import multiprocessing
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch
import torchvision
from pytorch_quantization.nn import QuantConv2d, TensorQuantizer
from torch import nn

from benchmarks import train_speed
from utils.errors import UserError


@pytest.mark.usefixtures("small_digits")
def test_train_speed_times_both_recipes_in_both_modes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_speed, "WORKERS", 2)
    left = []
    free = train_speed.free
    monkeypatch.setattr(train_speed, "free", lambda: (free(), left.append(multiprocessing.active_children())))
    threads = threading.active_count()
    path = tmp_path / "record.json"
    argv = ["--dataset", "digits", "--stem", "imagenet", "--batch_size", "16", "--reference_batch_size", "20", "--epochs", "2"]
    train_speed.main([*argv, "--record", str(path)])
    record = json.loads(path.read_text())
    assert (set(record), record["kind"]) == ({"kind", "environment", "commit", "flags", "rows"}, "train_speed")
    rows = record["rows"]
    cases = [(row["recipe"], row["mode"], row["batch_size"], row["images"]) for row in rows]
    assert cases == [
        (recipe, mode, *sizes) for recipe, *sizes in (("reference", 20, 50), ("ours", 16, 48)) for mode in ("float", "qat")
    ]
    flops = train_speed.flops_per_image("resnet18", "imagenet", 10, (16, 16, 3))
    for row in rows:
        assert set(row) == {field.name for field in fields(train_speed.Row)}
        assert (len(row["epochs_s"]), len(row["warm_up_s"]), row["arithmetic"], row["peak_tflops"]) == (2, 1, "fp32", None)
        assert row["epoch_s"] == pytest.approx(sum(row["epochs_s"]) / 2)
        assert row["compile_s"] == pytest.approx(row["warm_up_s"][0] - row["epoch_s"])
        assert row["images_s"] == pytest.approx(row["images"] / row["epoch_s"])
        assert row["tflops"] == pytest.approx(flops * row["images_s"] / 1e12)
        assert 0 < row["loss"] < 20
    printed = capsys.readouterr().out
    ratio = rows[0]["epoch_s"] / 50 / (rows[2]["epoch_s"] / 48)
    assert f"imagenet stem, time per image, float, reference / ours: {ratio:.2f}" in printed
    assert sum("time per image" in line for line in printed.splitlines()) == 4
    assert left == [[]] * 4  # no worker of one timing runs during the next
    assert threading.active_count() <= threads + 1  # tqdm's own


def test_train_speed_counts_the_products_of_the_reference_network():
    """Against torchvision's published multiply-adds at 224 pixels, and against the layers' shapes."""
    published = torchvision.models.ResNet18_Weights.DEFAULT.meta["_ops"] * 1e9  # forward
    first = 112 * 112 * 64 * 3 * 49  # no gradient for the images
    flops = train_speed.flops_per_image("resnet18", "imagenet", 1000, (224, 224, 3))
    assert flops == pytest.approx(2 * (3 * published - first), rel=1e-3)

    model, shapes = train_speed.reference_network("resnet18", "cifar", 10, False), {}
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda module, _, out: shapes.update({module: out.shape[2:].numel()}))
    model(torch.zeros(2, 3, 32, 32))
    products = {module: pixels * module.weight.numel() for module, pixels in shapes.items()}
    expected = 2 * (3 * sum(products.values()) - products[model.conv1])
    assert train_speed.flops_per_image("resnet18", "cifar", 10, (32, 32, 3)) == expected


def test_the_quantized_reference_has_the_librarys_layers_and_ranges():
    float_classes = nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d
    model = train_speed.reference_network("resnet18", "cifar", 10, True)
    assert (nn.Conv2d, nn.Linear, nn.AdaptiveAvgPool2d) == float_classes
    assert sum(isinstance(module, QuantConv2d) for module in model.modules()) == 20
    assert isinstance(model.conv1, QuantConv2d)
    assert model.conv1.stride == (1, 1)
    model.load_state_dict(train_speed.reference_network("resnet18", "cifar", 10, False).state_dict())
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    data = train_speed.Images(images, np.arange(6), torchvision.transforms.ToTensor())
    train_speed.calibrate_by_maximum(model, data, 4, torch.device("cpu"))
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, TensorQuantizer)}
    assert len(quantizers) == 2 * (20 + 1) + 1  # the pool has no weight
    assert all(q.amax.isfinite().all() and q._if_quant and not q._if_calib for q in quantizers.values())
    assert model.conv1._input_quantizer.amax.item() == pytest.approx(images.max() / 255)
    assert model.conv1._weight_quantizer.amax.numel() == 64


@pytest.mark.parametrize("flag", ["--epochs", "--warm_up", "--reference_batch_size"])
def test_train_speed_wants_at_least_one(flag):
    with pytest.raises(UserError, match="at least 1"):
        train_speed.main(["--dataset", "digits", flag, "0"])
