"""What the networks keep of torchvision's, and what the stem changes."""

import subprocess
import sys

import pytest
import torch
from conftest import EXAMPLE, ROOT, STEMMED, build, randomise_batch_norm
from torch import nn

import models
from utils.quantization.modularize import modularize


@pytest.mark.parametrize("name", STEMMED)
def test_names_and_shapes_of_all_weights_are_torchvisions(name):
    from torchvision.models import get_model

    def shapes_of(model):
        return {key: value.shape for key, value in model.state_dict().items()}

    expected = shapes_of(get_model(name, num_classes=10))
    for stem in ("imagenet", "cifar"):
        shapes = shapes_of(build(name, stem))
        differing = {key for key in expected if shapes.get(key) != expected[key]}
        assert shapes.keys() == expected.keys()
        assert differing == ({"conv1.weight"} if (name[:6], stem) == ("resnet", "cifar") else set())


@torch.no_grad()
@pytest.mark.parametrize("name", STEMMED)
def test_with_modules_for_functions_a_network_computes_what_it_computed(name):
    torch.manual_seed(0)
    model = models.build(name, 10, "imagenet").eval()
    randomise_batch_norm(model)
    images = torch.randn(2, 3, 40, 32)
    expected = model(images)
    assert modularize(model, EXAMPLE) == {}
    assert torch.equal(model(images), expected)


@torch.no_grad()
@pytest.mark.parametrize(("stem", "size"), [("imagenet", 1), ("cifar", 4)])
@pytest.mark.parametrize("name", STEMMED)
def test_the_stem_decides_how_many_pixels_the_last_feature_map_has(name, stem, size):
    model = build(name, stem).eval()
    seen = []
    model.avgpool.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    model(torch.zeros(1, 3, 32, 32))
    assert seen == [(size, size)]


def test_what_training_drops_at_random_is_kept_in_evaluation():
    torch.manual_seed(0)
    model, images = build("efficientnet_b0", "imagenet"), torch.randn(4, 3, 32, 32)
    randomise_batch_norm(model)
    for module in model.modules():
        module.train(not isinstance(module, nn.BatchNorm2d))
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def test_who_needs_no_torchvision_does_not_wait_for_it():
    """Importing it takes longer than torch itself."""
    code = (
        "import sys, models\n"
        "models.build('vanilla_cnn', 10, 'cifar')\n"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
