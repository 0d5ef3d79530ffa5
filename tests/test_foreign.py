"""Networks and weights from elsewhere: named, loaded, and refused where they cannot be."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import digits_cut_to, small_net
from PIL import Image
from safetensors.torch import save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dataset as dataset_room
import infer
import train
from models import foreign
from utils import checkpoint as ckpt
from utils import networks
from utils.checkpoint import Checkpoint
from utils.errors import UserError
from utils.quantization import quantize_modules
from utils.specs import OWN_STEM, DataSpec, NetworkSpec

OWN = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.head = nn.Linear(8, num_classes)

number = 5

def nothing(num_classes):
    pass

def other_arguments(classes):
    return Net(classes)

def ends(num_classes):
    raise SystemExit(3)

def deaf(num_classes):
    return Net(1000)

def two(num_classes):
    class Two(Net):
        def forward(self, x):
            return super().forward(x), x
    return Two(num_classes)

def large(num_classes):
    return nn.Sequential(nn.Conv2d(3, 8, 99), Net(num_classes))

def of_batch(num_classes):
    net = Net(num_classes)
    net.bn = nn.BatchNorm2d(8, track_running_stats=False)
    return net

def squeezed(num_classes):
    class Squeezed(Net):
        def forward(self, x):
            return super().forward(x).squeeze()
    return Squeezed(num_classes)

def scripted(num_classes):
    import torch
    return torch.jit.script(Net(num_classes))

def compiled(num_classes):
    import torch
    return torch.compile(Net(num_classes))

def partly_compiled(num_classes):
    net = Net(num_classes)
    net.conv = compiled(3)
    return net

def compiled_function(num_classes):
    import torch
    class Compiled(Net):
        forward = torch.compile(Net.forward, backend="eager")
    return Compiled(num_classes)

def frozen(num_classes):
    return Net(num_classes).requires_grad_(False)

def frozen_backbone(num_classes):
    net = frozen(num_classes)
    net.head.requires_grad_(True)
    return net

def extra(num_classes):
    class Extra(Net):
        def get_extra_state(self):
            return {"note": "mine"}
        def set_extra_state(self, state):
            pass
    return Extra(num_classes)

def shuffled(num_classes):
    net = Net(num_classes)
    net.relu = nn.ChannelShuffle(2)
    return net

def viewed(num_classes):
    # as PyTorch's tutorial ends its convolutions
    class Viewed(Net):
        def forward(self, x):
            x = self.relu(self.bn(self.conv(x)))
            return self.head(x.view(x.size(0), -1))
    net = Viewed(num_classes)
    net.head = nn.Linear(8 * 7 * 7, num_classes)
    return net

def fails(num_classes):
    raise RuntimeError("two\\nlines")
"""
RUN = "--dataset digits --num_epochs 1 --batch_size 32 --optimizer sgd"
IMAGENET = "0.485 0.456 0.406, std 0.229 0.224 0.225"


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """The working directory holds a module of that name, which nobody has imported yet."""
    name = f"own_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


@pytest.fixture
def tiny_digits(digits):
    """For the rest of the test, `--dataset digits` has 60 train and 40 test images of 16x16."""
    with digits_cut_to(60, 40, digits, width=16):
        yield


def build_error(name):
    with pytest.raises(UserError) as error:
        foreign.build(name, 7)
    assert "\n" not in str(error.value)
    return str(error.value)


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def seeded(classes, seed):
    torch.manual_seed(seed)
    return small_net(classes)


# names


def test_a_callable_of_the_working_directory_makes_a_network(own_module):
    model = foreign.build(f"{own_module}:Net", 7)
    assert type(model).__name__ == "Net"
    assert model.head.out_features == 7


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("Nett", "has no attribute 'Nett'"),
        ("number", "'int' object is not callable"),
        ("nothing", "it returns NoneType, not a torch.nn.Module"),
        ("other_arguments", "unexpected keyword argument 'num_classes'"),
        ("ends", "it ends the program"),
        ("fails", "it cannot be built with num_classes=7: RuntimeError: two lines ("),
    ],
)
def test_a_callable_that_makes_no_network_is_one_line(own_module, attribute, said):
    assert said in build_error(f"{own_module}:{attribute}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = (", "SyntaxError: '(' was never closed"),
        ("import no_such_package", "No module named 'no_such_package', neither in "),
        ("import sys\nsys.exit(0)", "it ends the program; put that behind if __name__"),
        ("1 / 0", "ZeroDivisionError: division by zero ("),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(own_module, tmp_path, text, said):
    (tmp_path / f"{own_module}.py").write_text(text)
    line = build_error(f"{own_module}:Net")
    assert f"--m {own_module}:Net: it cannot be imported: {said}" in line
    assert f"{own_module}.py" in line or said.startswith("No module")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:make", "No module named 'no_such_module', neither in "),
        ("no_such_package.part:make", "No module named 'no_such_package', neither in "),
        ("a:b:c", "a network from elsewhere is torchvision/NAME, timm/NAME or package"),
        ("a b:c", "a network from elsewhere is"),
        ("hub/resnet18", "a network from elsewhere is"),
        ("torchvision/resnet19", "torchvision has no such network; near it: resnet18"),
        ("torchvision/fasterrcnn_resnet50_fpn", "torchvision has no such network"),
        ("torchvision/ResNet", "torchvision has no such network"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(own_module, name, said):
    assert said in build_error(name)


@pytest.mark.parametrize(
    ("name", "text", "module"),
    [
        ("models.mine:make", "", "models.mine"),
        ("layers:make", "", "layers"),
        ("{own}:Net", "from utils.blocks import Block", "utils.blocks"),
        ("{own}:Net", "from dataset import Mine", "dataset"),
    ],
)
def test_a_package_named_as_one_of_this_projects_is_one_line(
    own_module, tmp_path, name, text, module
):
    (tmp_path / f"{own_module}.py").write_text(text)
    package = module.partition(".")[0]
    said = f"{module} is looked for in this project's own {package}: give your {package} another"
    assert said in build_error(name.format(own=own_module))


def test_torchvisions_networks_are_theirs_without_weights():
    model = foreign.build("torchvision/squeezenet1_1", 7)
    assert type(model).__module__ == "torchvision.models.squeezenet"
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_timm_is_asked_for_a_network_by_a_name_that_downloads_nothing(monkeypatch):
    calls = []

    def create_model(name, **options):
        calls.append((name, options))
        return nn.Identity()

    fake = SimpleNamespace(list_models=lambda: ["resnet26d"], create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", fake)
    foreign.build("timm/resnet26d.bt_in1k", 7)
    assert calls == [("resnet26d.bt_in1k", {"pretrained": False, "num_classes": 7})]
    for name in ("resnet26x", "hf-hub:timm/resnet26d", "local-dir:/tmp"):
        assert "timm has no such network" in build_error(f"timm/{name}")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="timm"):  # `utils.errors` makes a line of it
        foreign.build("timm/resnet26d", 7)


def test_a_network_from_elsewhere_has_its_own_stem(error_line):
    assert str(NetworkSpec("timm/x", "own", 2)) == "timm/x (own stem)"
    for name, stem in (("timm/x", "cifar"), ("a:b", "imagenet"), ("resnet18", "own")):
        with pytest.raises(ValueError, match="there is no network"):
            NetworkSpec(name, stem, 2)
    line = error_line(train.main, ["--m", "torchvision/resnet18", "--stem", "cifar"])
    assert "--stem cifar: torchvision/resnet18 has no other stem than its own" in line


@pytest.mark.parametrize("name", ["timm/resnet26d", "nowhere:make"])
def test_pretrained_weights_are_torchvisions(error_line, name):
    line = error_line(train.main, ["--m", name, "--pretrain"])
    assert f"--pretrain: torchvision has no weights for {name}; name a file" in line


def test_torchvisions_weights_fill_a_network_named_by_it(monkeypatch):
    from torchvision.models import ResNet18_Weights, resnet18

    torch.manual_seed(0)
    source = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda self, **_: source)
    model = foreign.build("torchvision/resnet18", 10)
    classifier = model.fc.weight.clone()
    networks.load_imagenet_weights(model, "torchvision/resnet18")
    assert torch.equal(model.conv1.weight, source["conv1.weight"])
    assert torch.equal(model.fc.weight, classifier)


def test_what_only_a_checkpoint_names_is_not_imported(
    own_module, tiny_digits, quick_latencies, tmp_path, error_line, capsys
):
    name = f"{own_module}:Net"
    train.main(f"--m {name} {RUN} --od {tmp_path} --en run".split())
    best, last = tmp_path / "run" / "ckpt_best", tmp_path / "run" / "ckpt_1"
    assert vars(ckpt.load(best).network) == {"name": name, "stem": "own", "num_classes": 10}

    # as if another process began
    sys.modules.pop(own_module)
    load = ["--load_ckpt", best]
    for main, argv in (
        (train.main, ["--resume", last.parent, "--num_epochs", "2"]),
        (train.main, [*load, "--quantize", "--partial_ckpt", "--od", tmp_path]),
        (train.main, [*load, "--od", tmp_path]),
        (infer.main, [*load, "--export_only"]),
    ):
        line = error_line(main, argv)
        assert line.endswith(f"if you trust it, add --m {name}")
        assert own_module not in sys.modules
    line = error_line(infer.main, [*load, "--m", "os:system"])
    assert "--m os:system contradicts the checkpoint" in line

    # named again, it goes on, and through everything
    train.main(["--resume", str(last.parent), "--num_epochs", "2", "--m", name])
    infer.main(f"--load_ckpt {best} --m {name} --FP32 --INT8PTC --export_only".split())
    sys.modules.pop(own_module)
    capsys.readouterr()
    # an export has no code
    infer.main(f"--onnx {best}_onnx --FP32 --backend onnxruntime --batch_size".split())
    assert f"{name} (own stem) on digits" in capsys.readouterr().out
    assert own_module not in sys.modules


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("deaf", "of 2 images it makes (2, 1000), not logits (2, 10): it must obey num_classes="),
        ("two", "of 2 images it makes tuple, not logits (2, 10)"),
        ("large", "it fails on images of 16x16: RuntimeError: "),
    ],
)
def test_a_network_that_makes_no_logits_of_the_images_is_one_line(
    own_module, tiny_digits, tmp_path, error_line, attribute, said
):
    argv = f"--m {own_module}:{attribute} {RUN} --od {tmp_path}/out".split()
    assert f"--m {own_module}:{attribute}: {said}" in error_line(train.main, argv)
    assert list((tmp_path / "out").iterdir()) == []


# state dicts of others


def saved(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("key", ["state_dict", "model", "net", "ema"])
def test_a_state_dict_is_found_beside_other_things(tmp_path, capsys, key):
    state = snapshot(small_net())
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1}]}
    path = saved(tmp_path, {"epoch": 3, key: state, "optimizer": optimizer})
    loaded = ckpt.load(path)
    assert not loaded.whole
    assert loaded.state.keys() == state.keys()
    said = f"{path}: the state dict under {key!r}; left aside: epoch, optimizer\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    "content",
    [
        [{"w": torch.ones(1)}],
        {"state_dict": [torch.ones(1)]},
        {"state_dict": {}},
        {"state_dict": {"w": torch.ones(1), "epoch": 3}},
        {"state_dict": {"model": {"w": torch.ones(1)}}},
        {1: torch.ones(1)},
        {"model": None, "net": 5},
    ],
)
def test_what_is_no_state_dict_is_not_taken_for_one(tmp_path, content):
    with pytest.raises(UserError, match="not a checkpoint of this project and not a state dict"):
        ckpt.load(saved(tmp_path, content))


def test_what_holds_no_state_dict_is_named_by_its_keys(tmp_path):
    said = r"state dict \(its keys are epoch, ema\): save model\.state_dict\(\)"
    with pytest.raises(UserError, match=said):
        ckpt.load(saved(tmp_path, {"epoch": 3, "ema": {"shadow": {"w": torch.ones(1)}}}))


@pytest.mark.parametrize("keys", [("model", "state_dict"), ("ema", "student"), (1, 2)])
def test_of_two_state_dicts_none_is_guessed(tmp_path, keys):
    state = {"w": torch.ones(1)}
    with pytest.raises(UserError, match=rf"holds several state dicts \({keys[0]}, {keys[1]}\)"):
        ckpt.load(saved(tmp_path, dict.fromkeys(keys, state)))


def test_a_network_goes_before_its_average(tmp_path):
    state, average = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    loaded = ckpt.load(saved(tmp_path, {"model_ema": average, "model": state})).state
    assert torch.equal(loaded["w"], state["w"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "module._orig_mod.model."])
def test_a_prefix_of_all_names_is_taken_off(prefix):
    source, model = seeded(4, 1), seeded(4, 2)
    state = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    assert ckpt.load_weights(model, state).endswith(f"; the names without their prefix {prefix}")
    assert torch.equal(model[0].weight, source[0].weight)


def test_a_prefix_that_is_the_networks_own_stays():
    source, model = nn.Module(), nn.Module()
    source.model, model.model = seeded(4, 1), seeded(4, 2)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    assert ckpt.load_weights(model, state).endswith("without their prefix module.")
    assert torch.equal(model.model[0].weight, source.model[0].weight)


def test_a_prefix_of_some_names_stays():
    state = snapshot(small_net())
    state["module.0.weight"] = state.pop("0.weight")
    with pytest.raises(UserError, match=r"1 missing: 0\.weight; 1 unexpected: module\.0\.weight"):
        ckpt.load_weights(small_net(), state)


def test_what_stands_beside_a_prefix_is_left_aside_and_named():
    source, model = seeded(4, 1), seeded(4, 2)
    state = {"criterion.weight": torch.ones(4)} | AveragedModel(source).state_dict()
    line = ckpt.load_weights(model, state)
    said = "the names without their prefix module.; 2 left aside: criterion.weight, n_averaged"
    assert line.endswith(said)
    assert torch.equal(model[0].weight, source[0].weight)


def test_a_part_that_is_built_as_the_whole_is_not_taken_for_it():
    def nested(depth):
        inner = [nested(depth - 1)] if depth else []
        return nn.Sequential(nn.Linear(2, 2), *inner)

    source, model = nested(5), nested(5)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    assert ckpt.load_weights(model, state).endswith("without their prefix module.")
    assert torch.equal(model[0].weight, source[0].weight)


def test_of_a_network_and_its_average_none_is_guessed():
    state = snapshot(nn.ModuleDict({"model": small_net(), "ema": small_net()}))
    said = r"under several prefixes \(ema\., model\.\): save one alone"
    with pytest.raises(UserError, match=said):
        ckpt.load_weights(small_net(), state)


def test_what_is_wrong_under_a_prefix_is_named_without_it():
    state = {f"module.{key}": value for key, value in snapshot(small_net()).items()}
    del state["module.0.weight"]
    with pytest.raises(UserError, match=r"1 missing: 0\.weight; the names without their"):
        ckpt.load_weights(small_net(), state)


# safetensors

TENSORS = {
    "w": torch.randn(2, 3),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False]),
    "none": torch.zeros(0, 4),
}
NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def safetensors(tensors, change=lambda header: None, more=b""):
    """A file of them, by the format's specification; `change` edits its header first."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        values = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(values)]
        data += values
        shape = list(tensor.shape)
        entry = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        header[name] = entry
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data + more


def test_safetensors_are_read(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(TENSORS))
    state = ckpt.load(path).state
    assert state.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    assert capsys.readouterr().out == f"{path}: a safetensors file of 5 tensors\n"


def entry(**changes):
    return lambda header: header["half"].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        entry(data_offsets=[20, 26]),
        entry(data_offsets=[25, 31]),
        entry(data_offsets=[-6, 0]),
        entry(data_offsets=[24, 10**30]),
        entry(data_offsets=[24, 40]),
        entry(data_offsets=[24]),
        entry(data_offsets="ab"),
        entry(shape=[4]),
        entry(shape=[3.0]),
        entry(shape=[-3, -1]),
        entry(shape=None),
        lambda header: header["none"].update(shape=[0, 2**63]),
        entry(dtype="no such type"),
        entry(dtype=["F32"]),
        lambda header: header.pop("mask"),
        lambda header: header.update(w=5),
        lambda header: header["w"].pop("dtype"),
    ],
)
def test_safetensors_that_contradict_themselves_are_refused(tmp_path, change):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(TENSORS, change))
    with pytest.raises(UserError, match="is a damaged safetensors file"):
        ckpt.load(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "BOOL"])
def test_safetensors_of_types_that_the_network_cannot_hold_are_refused(tmp_path, dtype):
    model = nn.Linear(6, 1, bias=False)
    path = tmp_path / "model.safetensors"
    values = {"weight": torch.zeros(1, 6, dtype=torch.bool)}
    path.write_bytes(safetensors(values, lambda header: header["weight"].update(dtype=dtype)))
    with pytest.raises(UserError, match="of another type"):
        ckpt.load_weights(model, ckpt.load(path).state)


def test_safetensors_name_a_shared_weight_once(tmp_path):
    source, model = (nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm2d(3)]) for _ in range(2))
    for network in (source, model):
        network.extend([network[1], nn.Linear(3, 3)])
        network[3].weight = network[0].weight
    path = tmp_path / "model.safetensors"
    save_model(source, path)
    assert "0 unexpected, 0 missing" in ckpt.load_weights(model, ckpt.load(path).state)
    assert torch.equal(model[0].weight, source[0].weight)
    assert model[3].weight is model[0].weight


def test_safetensors_without_tensors_lack_everything(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({}))
    with pytest.raises(UserError, match="missing"):
        ckpt.load_weights(nn.Linear(2, 1), ckpt.load(path).state)


@pytest.mark.parametrize("cut", [-1, -9, 60])
def test_cut_safetensors_are_refused(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(TENSORS)[:cut])
    with pytest.raises(UserError, match="damaged"):
        ckpt.load(path)


@pytest.mark.parametrize("text", [b"{", b"{" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b"{\xff"])
def test_a_header_that_is_no_json_is_refused(tmp_path, text):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(UserError, match="damaged"):
        ckpt.load(path)


# another classifier


class Heads(nn.Module):
    """A classifier, an auxiliary one before it, and a layer after both in the order of names."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Conv2d(3, 6, 3)
        self.aux = nn.Conv2d(6, classes, 1)
        self.fc = nn.Linear(6, classes)
        self.last = nn.Linear(6, 6)


def test_the_last_layer_and_heads_like_it_are_fresh():
    source, model = Heads(9), Heads(4)
    before = snapshot(model)
    line = ckpt.load_weights(model, snapshot(source), new_classifier=True)
    assert line.startswith("4 float tensors and 0 ranges loaded")
    assert line.endswith("; fresh: aux.bias, aux.weight, fc.bias, fc.weight")
    assert torch.equal(model.features.weight, source.features.weight)
    assert torch.equal(model.last.weight, source.last.weight)
    assert torch.equal(model.fc.weight, before["fc.weight"])
    assert torch.equal(model.aux.bias, before["aux.bias"])


def test_with_as_many_classes_the_last_layer_of_all_is_fresh():
    source, model = seeded(4, 1), seeded(4, 2)
    line = ckpt.load_weights(model, snapshot(source), new_classifier=True)
    assert line.endswith("; fresh: 7.bias, 7.weight")


def test_only_the_classifier_may_be_of_another_shape():
    state = snapshot(seeded(9, 1))
    state["3.weight"] = torch.ones(8, 8, 1, 1)
    with pytest.raises(UserError, match=r"1 of another shape: 3\.weight$"):
        ckpt.load_weights(seeded(4, 2), state, new_classifier=True)
    with pytest.raises(UserError, match="it is of other classes: add --new_classifier"):
        ckpt.load_weights(seeded(4, 2), snapshot(seeded(9, 1)))
    # a quantized network cannot have a fresh layer
    quantized = seeded(4, 2)
    quantize_modules(quantized, torch.randn(2, 3, 16, 16))
    with pytest.raises(UserError, match="train in float with --new_classifier first"):
        ckpt.load_weights(quantized, snapshot(seeded(9, 1)), allow_missing_ranges=True)


# what train.py makes of them


def write_folder(root, classes=("a", "b"), size=(20, 12)):
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")


def whole(model, classes, **changes):
    """A float checkpoint of train.py of a network on digits."""
    values = {"split_seed": 0, "mean": [0.25] * 3, "std": [0.5] * 3, "digest": "1f", **changes}
    info = DataSpec("digits", 32, classes, **values)
    spec = NetworkSpec("vanilla_cnn", "cifar", len(classes))
    return Checkpoint(model.state_dict(), spec, info, recipe={"seed": 0})


def trained(tmp_path, name="run"):
    return ckpt.load(tmp_path / name / "ckpt_best")


def test_foreign_weights_train_with_the_normalisation_that_is_said(
    own_module, tiny_digits, tmp_path, capsys, error_line
):
    state = foreign.build(f"{own_module}:Net", 10).state_dict()
    path = saved(tmp_path, {"net": {f"module.{key}": value for key, value in state.items()}})
    start = f"--m {own_module}:Net {RUN} --load_ckpt {path} --od {tmp_path}"
    train.main(f"{start} --en a".split())
    out = capsys.readouterr().out
    assert "normalisation: mean 0.3" in out
    assert "computed from the train images; if the weights need another, name it" in out
    assert "the state dict under 'net'" in out
    assert "the names without their prefix module." in out

    train.main(f"{start} --en b --normalization imagenet".split())
    assert f"normalisation: mean {IMAGENET}, as the flags" in capsys.readouterr().out
    info = trained(tmp_path, "b").data
    assert (info.mean, info.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])

    # resumed it stays, and cannot be another
    again = ["--m", f"{own_module}:Net", "--num_epochs", "2"]
    resume = ["--resume", str(tmp_path / "b"), *again]
    line = error_line(train.main, [*resume, "--mean", 0.5, 0.5, 0.5, "--std", 1, 1, 1])
    assert "--mean 0.5 0.5 0.5 contradicts the checkpoint, which says 0.485 0.456 0.406" in line
    train.main([*resume, "--normalization", "imagenet"])
    assert trained(tmp_path, "b").data == info


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--mean 0.5 0.5 0.5", "--mean and --std belong together"),
        ("--std 0.5 0.5 0.5", "--mean and --std belong together"),
        ("--mean 124 116 104 --std 58 57 57", "in units of the full range, 0 to 1"),
        ("--mean nan 0.5 0.5 --std 1 1 1", "in units of the full range, 0 to 1"),
        ("--mean 0.5 0.5 0.5 --std 1 0 1", "in units of the full range, 0 to 1"),
        ("--mean 0 0 0 --std 1 1 1 --normalization imagenet", "--normalization and --mean both"),
        ("--new_classifier", "--new_classifier: in float training"),
        ("--new_classifier --load_ckpt {} --quantize", "--new_classifier: in float training"),
        (
            "--new_classifier --resume x",
            "--new_classifier, --output_dir: --resume goes on with a run as it began",
        ),
        ("--dataset folder --img_size 8 8 8", "--img_size 8 8 8: height and width, or one"),
        ("--dataset folder --img_size 8 5000", "--img_size: 8 to 4096 pixels"),
    ],
)
def test_flags_that_cannot_be_are_one_line(tmp_path, error_line, flags, said):
    path = saved(tmp_path, small_net().state_dict())
    argv = f"--m vanilla_cnn --od {tmp_path}/out {flags.format(path)}".split()
    assert said in error_line(train.main, argv)


def test_a_checkpoint_of_other_classes_gets_a_new_classifier(tmp_path, capsys, error_line):
    torch.manual_seed(0)
    source = networks.build_float(NetworkSpec("vanilla_cnn", "cifar", 3), (32, 32))
    ckpt.save(tmp_path / "ckpt", whole(source, ["x", "y", "z"]))
    write_folder(tmp_path / "data")
    argv = f"--load_ckpt {tmp_path}/ckpt --dataset folder --data_dir {tmp_path}/data --img_size 24 "
    argv += f"16 --num_epochs 1 --batch_size 8 --optimizer sgd --lr 1e-9 --od {tmp_path} --en run"
    assert "--dataset folder contradicts" in error_line(train.main, argv.split())
    train.main([*argv.split(), "--new_classifier"])
    out = capsys.readouterr().out
    assert "; fresh: fc.bias, fc.weight" in out
    assert "normalisation: mean 0.25 0.25 0.25, std 0.5 0.5 0.5, as the flags" in out

    best = trained(tmp_path)
    assert best.network == NetworkSpec("vanilla_cnn", "cifar", 2)
    assert (best.data.classes, best.data.img_size) == (["a", "b"], [24, 16])
    assert (best.data.mean, best.recipe["kind"]) == ([0.25] * 3, "pretrained")
    torch.testing.assert_close(best.state["features.0.weight"], source.features[0].weight)

    # resumed, the classifier is its own
    train.main(["--resume", str(tmp_path / "run"), "--num_epochs", "2"])
    assert "fresh" not in capsys.readouterr().out

    # the export takes images of that height and width
    infer.main(f"--load_ckpt {tmp_path}/run/ckpt_best --FP32 --export_only".split())
    manifest = json.loads((tmp_path / "run" / "ckpt_best_onnx" / "export.json").read_text())
    assert manifest["data"]["img_size"] == [24, 16]


def test_an_image_size_has_one_form_however_it_is_written():
    def spec(size):
        return DataSpec("folder", size, ["a"], 0, [0.5] * 3, [0.5] * 3)

    assert spec(24) == spec([24, 24])
    assert spec([24, 16]).img_size == [24, 16]
    for wrong in ([], [1, 2, 3], [0, 5], [5, 10**9], 0):
        with pytest.raises(ValueError, match="cannot be"):
            spec(wrong)
    with pytest.raises(UserError, match="8 to 4096 pixels"):
        dataset_room.load("digits", "unused", [7, 8])


def test_a_network_with_versioned_modules_loads_what_train_wrote():
    """MNASNet asks a state dict for its version, which a file of ours does not keep."""
    model = foreign.build("torchvision/mnasnet0_5", 3)
    ckpt.load_weights(model, dict(snapshot(model)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("scripted", "the network is TorchScript"),
        ("compiled", "the network is made by torch.compile"),
        ("partly_compiled", "conv is made by torch.compile"),
        ("extra", "its state has _extra_state, which is no tensor"),
    ],
)
def test_what_cannot_be_saved_or_exported_is_refused_before_training(own_module, name, said):
    spec = NetworkSpec(f"{own_module}:{name}", OWN_STEM, 3)
    with pytest.raises(UserError, match=said):
        networks.build_float(spec, (16, 16))


@pytest.mark.usefixtures("tiny_digits")
def test_a_network_that_flattens_by_view_is_trained_calibrated_and_compared(
    own_module, tiny_digits, quick_latencies, tmp_path, capsys
):
    name = f"{own_module}:viewed"
    train.main(["--m", name, *RUN.split(), "--od", f"{tmp_path}/out", "--en", "float"])
    flags = "--quantize --partial_ckpt --num_epochs 0 --batch_size 32"
    start = ["--m", name, "--load_ckpt"]
    there = f"{tmp_path}/out/float/ckpt_best {flags} --od {tmp_path}/out --en ptq"
    train.main([*start, *there.split()])
    infer.main([*start, f"{tmp_path}/out/ptq/ckpt_0", "--INT8PTC", "--batch_size", "1"])
    assert "FAKE-QUANT-PTC" in capsys.readouterr().out


def test_a_view_that_fails_where_channels_are_last_is_refused_before_training(
    own_module, tiny_digits, tmp_path, error_line, monkeypatch
):
    monkeypatch.setattr(networks, "memory_format", lambda *_: torch.channels_last)  # as on a GPU
    argv = ["--m", f"{own_module}:viewed", *RUN.split(), "--od", tmp_path / "out"]
    line = error_line(train.main, argv)
    assert "it fails on images of 16x16" in line
    assert "Use .reshape(...) instead" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("shuffled", "exporter cannot write this network"),
        ("compiled_function", "dynamo-optimized function"),
        ("of_batch", "bn has no running statistics"),
        ("squeezed", "of a single image the network makes (10,), not (1, classes)"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(
    own_module, tmp_path, error_line, name, said
):
    argv = ["--m", f"{own_module}:{name}", *RUN.split(), "--od", tmp_path]
    assert said in error_line(train.main, argv)
    assert not list(tmp_path.glob("*/ckpt_*"))


def test_a_frozen_network_is_calibrated_but_not_trained(
    own_module, tiny_digits, tmp_path, error_line
):
    weights = saved(tmp_path, foreign.build(f"{own_module}:Net", 10).state_dict())
    argv = f"--m {own_module}:frozen --load_ckpt {weights} {RUN} --od {tmp_path}".split()
    quantize = ["--quantize", "--partial_ckpt"]
    for more in ([], quantize):
        line = error_line(train.main, [*argv, *more])
        assert "no parameter of the network has requires_grad" in line
    train.main([*argv, *quantize, "--num_epochs", "0", "--en", "ptq"])
    assert ckpt.load(tmp_path / "ptq" / "ckpt_best").epoch == 0


def test_a_frozen_backbone_stays_and_its_head_is_trained(own_module, tiny_digits, tmp_path):
    source = foreign.build(f"{own_module}:Net", 10).state_dict()
    weights = saved(tmp_path, source)
    argv = f"--m {own_module}:frozen_backbone --load_ckpt {weights} {RUN} --od {tmp_path} --en"
    for name, more in (("float", []), ("qat", ["--quantize", "--partial_ckpt"])):
        train.main([*argv.split(), name, *more])
        state = ckpt.load(tmp_path / name / "ckpt_1").state
        assert torch.equal(state["conv.weight"], source["conv.weight"])
        assert not torch.equal(state["head.weight"], source["head.weight"])


@pytest.mark.parametrize("name", ["no_such_module:make", "torchvision/resnet19"])
def test_a_wrong_name_is_told_before_the_images_are_read(tmp_path, monkeypatch, error_line, name):
    monkeypatch.setattr(dataset_room, "load", None)
    line = error_line(train.main, ["--m", name, "--dataset", "digits", "--od", tmp_path])
    assert f"--m {name}: " in line
