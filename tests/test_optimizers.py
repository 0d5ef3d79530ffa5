"""Muon: what it orthogonalises, what it leaves to SGD, and that its state lets it go on."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import models
from utils.training.optimizers import SGD_SCALE, Muon, load_optimizer, make_optimizer, newton_schulz

WIDE_AND_TALL = [
    (16, 8, 3, 3),
    (64, 64, 3, 3),
    (64, 3, 3, 3),
    (96, 48, 1, 1),
    (10, 40, 1, 1),
    (128, 16, 1, 3),
]


def kernels(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in shapes
    ]


def turned(kernel, **options):
    """A kernel (O, I, H, W) after the iteration, which wants no matrix to be taller than wide."""
    matrix = kernel.flatten(1)
    if len(matrix) > matrix.shape[1]:
        return (
            newton_schulz(matrix.mT[None].bfloat16(), **options)[0].mT.float().reshape(kernel.shape)
        )
    return newton_schulz(matrix[None].bfloat16(), **options)[0].float().reshape(kernel.shape)


def net():
    """A convolution that Muon orthogonalises, three others, BatchNorm and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, groups=2, bias=False),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def problem(count=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.arange(count) % 4


def train(model, optimizer, steps, rate=0.02):
    """Losses of full-batch steps."""
    images, labels = problem()
    losses = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# orthogonalisation


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize("shape", WIDE_AND_TALL)
def test_singular_values_become_about_one(shape, scale):
    kernel = kernels([shape])[0]
    result = turned(kernel * scale)
    matrix, before = result.flatten(1), kernel.flatten(1)
    values = torch.linalg.svdvals(matrix)
    assert len(values) == min(matrix.shape)
    assert 0.6 <= values.min() <= values.max() <= 1.3
    left, _, right = torch.linalg.svd(before, full_matrices=False)
    aligned = (
        left.T @ matrix @ right.T
    ).diagonal()  # along the singular vectors that the kernel has
    assert 0.6 <= aligned.min() <= aligned.max() <= 1.3


def test_five_iterations_are_enough_for_a_direction_two_hundred_times_weaker_than_another():
    left, right = (
        torch.linalg.qr(k.flatten(1)).Q for k in kernels([(32, 32, 1, 1), (288, 32, 1, 1)])
    )
    kernel = (left @ torch.diag(torch.logspace(0, -2.3, 32)) @ right.T).reshape(32, 32, 3, 3)
    values = torch.linalg.svdvals(turned(kernel).flatten(1))
    assert 0.6 <= values.min() <= values.max() <= 1.3
    assert torch.linalg.svdvals(turned(kernel, iterations=4).flatten(1)).min() < 0.6


def test_a_kernel_without_gradient_stays_zero():
    assert turned(torch.zeros(4, 2, 3, 3)).count_nonzero() == 0


# what is orthogonalised


def test_only_plain_convolutions_without_bias_are_orthogonalised():
    model = net()
    orthogonal, rest = make_optimizer(model, "muon").param_groups
    assert [id(p) for p in orthogonal["params"]] == [id(model[0].weight)]
    assert {id(p) for p in rest["params"]} == {id(p) for p in model.parameters()} - {
        id(model[0].weight)
    }
    assert (orthogonal["orthogonal"], rest["orthogonal"]) == (True, False)
    assert (orthogonal["scale"], rest["scale"]) == (1.0, SGD_SCALE)


@pytest.mark.parametrize("name", ["vanilla_cnn", "resnet18", "resnet50"])
def test_every_kernel_of_a_model_and_nothing_else_is_orthogonalised(name):
    model = models.build(name, 10, "cifar")
    orthogonal, rest = make_optimizer(model, "muon").param_groups
    assert all(p.ndim == 4 for p in orthogonal["params"])
    assert all(p.ndim < 4 for p in rest["params"])
    assert len(orthogonal["params"]) + len(rest["params"]) == len(list(model.parameters()))


# steps


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_step_fixes_the_length_and_moves_along_the_orthogonalised_momentum(layout):
    """Kernels of all shapes go together, and each as it would alone."""
    given = kernels([*WIDE_AND_TALL, (8, 4, 3, 3), (16, 2, 1, 1)])
    weights = [nn.Parameter(kernel.to(memory_format=layout)) for kernel in given]
    optimizer = Muon([{"params": weights}], momentum=0.9)
    buffers = [torch.zeros_like(weight) for weight in weights]
    for index, rate in enumerate((0.0, 0.1, 0.05)):
        optimizer.param_groups[0]["lr"] = rate
        gradients = kernels([weight.shape for weight in weights], seed=index + 1)
        before = [weight.detach().clone() for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
        for weight, gradient, old, buffer in zip(weights, gradients, before, buffers, strict=True):
            buffer.mul_(0.9).add_(gradient)
            update = turned(gradient + 0.9 * buffer)
            fixed = old * len(old) ** 0.5 / old.norm()
            assert fixed.norm().item() == pytest.approx(len(old) ** 0.5)
            torch.testing.assert_close(
                weight.detach(), fixed - rate * update, rtol=1e-5, atol=rate * 1e-2 + 1e-6
            )
            torch.testing.assert_close(weight.grad, gradient, rtol=0, atol=0)


def test_the_rest_is_trained_by_sgd_with_nesterov_momentum():
    model = net().double()
    theirs = copy.deepcopy(model)
    mine = Muon(
        [{"params": list(model.parameters()), "orthogonal": False, "scale": 1.0}], momentum=0.9
    )
    sgd = torch.optim.SGD(
        [{"params": theirs.parameters(), "scale": 1.0}], lr=0.0, momentum=0.9, nesterov=True
    )
    images, labels = problem()
    for rate in (0.1, 0.2, 0.05, 0.1, 0.0, 0.1):
        for network, optimizer in ((model, mine), (theirs, sgd)):
            optimizer.param_groups[0]["lr"] = rate
            F.cross_entropy(network(images.double()), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        for one, other in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_parameter_without_gradient_stays():
    model = net()
    model[0].weight.requires_grad_(False)
    model[8].bias.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = make_optimizer(model, "muon")
    train(model, optimizer, 1)
    after = model.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert torch.equal(after["8.bias"], before["8.bias"])
    assert not torch.equal(after["8.weight"], before["8.weight"])


def test_it_learns_a_small_problem():
    model = net()
    losses = train(model, make_optimizer(model, "muon"), 60, rate=0.05)
    assert losses[0] > 1.2
    assert losses[-1] < 0.5 * losses[0]


def test_its_state_continues_exactly():
    model = net()
    optimizer = make_optimizer(model, "muon")
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = train(model, optimizer, 3)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = net()
    resumed = make_optimizer(again, "muon")
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert len(saved["optimizer"]["state"]) == len(list(model.parameters()))
    assert train(again, resumed, 3) == whole
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(
            optimizer.state[one]["momentum_buffer"], resumed.state[other]["momentum_buffer"]
        )


def test_the_count_of_steps_of_a_cpus_run_comes_to_the_device_whose_optimizer_needs_it_there():
    source, target = (
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.ones(3, device="meta")),
    )  # in a GPU's place
    optimizer = torch.optim.AdamW([source], lr=0.5)
    source.grad = torch.ones(3)
    optimizer.step()
    resumed = torch.optim.AdamW([target], lr=0.0, capturable=True)
    load_optimizer(resumed, optimizer.state_dict())
    assert {value.device.type for value in resumed.state[target].values()} == {"meta"}
    assert (resumed.param_groups[0]["capturable"], resumed.param_groups[0]["lr"]) == (True, 0.5)


@pytest.mark.parametrize("own", [torch.contiguous_format, torch.channels_last])
def test_a_state_from_another_device_lies_in_memory_as_the_parameter_does(own):
    """A GPU has the channels last, a CPU first, and fused optimizers want one order."""
    (start,) = kernels([(16, 8, 3, 3)])
    for saved in (torch.contiguous_format, torch.channels_last):
        source, target = (nn.Parameter(start.to(memory_format=f)) for f in (saved, own))
        optimizers = [Muon([{"params": [p], "lr": 0.1}], momentum=0.9) for p in (source, target)]
        source.grad = torch.sin(source.detach())
        optimizers[0].step()
        load_optimizer(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
        buffers = [optimizers[0].state[source], optimizers[1].state[target]]
        buffers = [values["momentum_buffer"] for values in buffers]
        assert torch.equal(*buffers)
        assert buffers[1].stride() == target.stride()


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_from_another_device_does_not_change_how_the_optimizer_runs(fused):
    """torch takes "fused" from the state: a CPU's would make a GPU wait in every step."""
    weight = nn.Parameter(torch.ones(3))
    source, target = (
        torch.optim.SGD([weight], lr=rate, momentum=0.9, fused=f)
        for rate, f in ((0.5, not fused), (0.0, fused))
    )
    weight.grad = torch.ones(3)
    source.step()
    load_optimizer(target, source.state_dict())
    assert (target.param_groups[0]["fused"], target.param_groups[0]["lr"]) == (fused, 0.5)
    assert torch.equal(target.state[weight]["momentum_buffer"], torch.ones(3))
