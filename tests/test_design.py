"""The house of docs/design.md: which file may import which, and how long a function may be."""

import ast
import graphlib
import re
import sys

import pytest
from conftest import ROOT

LEVELS = (
    ("train", "infer"),
    ("utils.recipe",),
    ("utils.auto_quant",),
    ("utils.compare",),
    ("utils.networks",),
    ("utils.training",),
    ("utils.quantization", "utils.backends"),
    ("utils",),
    ("models",),
    ("layers",),
    ("dataset",),
)
"""Rooms from the roof down. A file imports files of its own room and of rooms below."""

OPEN_TO_ALL = "utils.errors"

ALLOWED = {
    "utils.quantization": {"utils", "layers"},
    "utils.training": {"utils", "utils.quantization", "layers"},
    "utils.backends": {"utils"},
    "utils": set(),
    "models": {"layers"},
    "layers": set(),
    "dataset": set(),
}
"""Room -> the only other rooms that it may import."""

EXCEPTIONS = {("utils.backends.pytorch", "layers")}

MAX_LINES = 60


def module_name(path):
    """`utils/files.py` -> `utils.files`; a package has its folder's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def product_files():
    paths = [ROOT / "train.py", ROOT / "infer.py"]
    for folder in ("utils", "layers", "models", "dataset"):
        paths += sorted((ROOT / folder).rglob("*.py"))
    return {module_name(path): path for path in paths}


FILES = product_files()
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def imported_names(node):
    """What one import statement may load: `from a import b` loads `a`, and `a.b` if that is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports hide which room they name"
        inside = [f"{node.module}.{alias.name}" for alias in node.names]
        files = [name for name in inside if name in FILES]
        # from a package of files, only the files that are named
        return files if len(files) == len(inside) else [node.module, *files]
    return []


def imports_of(module, nested=True):
    """Names that a file imports; without `nested`, only those that its own import loads."""
    names = []
    tree = TREES[module]
    for node in ast.walk(tree) if nested else tree.body:
        names += imported_names(node)
    return names


def imported_files(module, nested=True):
    return {name for name in imports_of(module, nested) if name in FILES}


def imported_packages(module, nested=True):
    """Top-level names of imported packages that are neither the project's nor Python's own."""
    packages = {name.split(".")[0] for name in imports_of(module, nested)}
    own = {name.split(".")[0] for name in FILES}
    return packages - own - sys.stdlib_module_names


def room(module):
    """The longest name of a room that the module is in."""
    rooms = [name for level in LEVELS for name in level]
    return max((name for name in rooms if f"{module}.".startswith(f"{name}.")), key=len)


def level(module):
    return next(index for index, names in enumerate(LEVELS) if room(module) in names)


def test_no_files_import_each_other_in_a_circle():
    graph = {module: imported_files(module) for module in FILES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert set(order) == set(FILES)


def test_imports_point_down_the_house():
    wrong = []
    for module in FILES:
        for name in imported_files(module) - {OPEN_TO_ALL}:
            below = level(name) > level(module)
            if not below and room(name) != room(module):
                wrong.append(f"{module} -> {name}")
    assert wrong == []


def test_rooms_import_only_what_their_row_of_the_table_says():
    wrong = []
    for module in FILES:
        here = room(module)
        allowed = ALLOWED.get(here)
        for name in imported_files(module) - {OPEN_TO_ALL}:
            there = room(name)
            known = there == here or (module, there) in EXCEPTIONS
            if allowed is not None and not known and there not in allowed:
                wrong.append(f"{module} -> {name}")
    assert wrong == []
    assert imported_files(OPEN_TO_ALL) == set()


def test_the_scripts_are_imported_by_no_file():
    for module in FILES:
        assert not imported_files(module) & {"train", "infer"}, module


def loaded_with(script):
    """All files that importing a script loads: what functions import comes later, or never."""
    loaded = set()
    todo = {script}
    while todo:
        module = todo.pop()
        loaded.add(module)
        # importing a.b loads a, too
        parents = {module.rpartition(".")[0]} & FILES.keys()
        todo |= (imported_files(module, nested=False) | parents) - loaded
    return loaded


def test_infer_runs_where_only_numpy_and_tqdm_are_installed():
    """A back end's own library comes when it is chosen."""
    loaded = loaded_with("infer")
    assert {"utils.compare", "utils.flags", "utils.manifest", "dataset"} <= loaded
    for module in loaded:
        assert imported_packages(module, nested=False) <= {"numpy", "tqdm"}, module


def test_torch_stays_out_of_what_deploys():
    for module in FILES:
        packages = imported_packages(module)
        if room(module) == "utils.backends" and module != "utils.backends.pytorch":
            assert "torch" not in packages, module
        if room(module) == "dataset" and module != "dataset.batches":
            assert "torch" not in packages, module
        if "pytorch_quantization" in packages:
            assert room(module) == "layers" or module == "utils.quantization.calibrate", module
        if room(module) == "models":
            assert packages <= {"torch", "torchvision", "timm"}, module


@pytest.mark.parametrize("module", FILES)
def test_functions_are_short(module):
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_LINES, f"{node.name} has {lines} lines"


def test_the_table_of_the_docs_has_the_rooms_in_this_order():
    lines = (ROOT / "docs" / "design.md").read_text().splitlines()
    cells = [line.split("|")[1] for line in lines if line.startswith("| `")]
    rows = []
    for rooms in LEVELS:
        for room_name in rooms:
            path = room_name.replace(".", "/")
            title = re.compile(rf"`{path}(\.py|/|/\*\.py)`")
            row = [index for index, cell in enumerate(cells) if title.search(cell)]
            assert len(row) == 1, room_name
            rows += row
    assert rows == sorted(rows)
