"""Engines on a GPU, against what ONNX Runtime or PyTorch predicts of the whole test set.

    EXPORT_DIR=... DATA_DIR=... python -m pytest -m gpu
    python tests/test_gpu.py EXPORT_DIR DATA_DIR
    python tests/test_gpu.py --reference EXPORT_DIR DATA_DIR

The second form runs without pytest and prints one line for each test. The third writes ONNX
Runtime's predictions to EXPORT_DIR, on any machine that has it; without them PyTorch's are the
reference. EXPORT_DIR is what `infer.py --export_only` wrote, DATA_DIR where its test images are.

Needs TensorRT, PyCUDA, NumPy and tqdm, neither torch nor onnx. Engines are built anew in a
temporary folder: what is in EXPORT_DIR is only read.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from unittest import SkipTest, mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import dataset
from utils.backends import tensorrt_build
from utils.backends.network import MIN_RUNS, predict
from utils.backends.tensorrt_build import EngineOptions, load_tensorrt
from utils.backends.tensorrt_run import TensorRTNetwork
from utils.compare import load_data
from utils.errors import UserError
from utils.files import atomic_path
from utils.manifest import IMPLICIT, PRECISIONS, graph_file, read_export
from utils.metrics import percent_equal

REFERENCE = "onnxruntime.npz"
REFERENCE_BATCH = 1000
SIZES = (1, 128)
LEVEL = 2

AGREEMENT_PCT = 99.5
BATCH_AGREEMENT_PCT = 99.9
ACCURACY_POINTS = 0.1
IMPLICIT_POINTS = 1.0

PARAMETERS = {
    "precision": tuple(PRECISIONS),
    "int8": ("INT8-PTC", "INT8-QAT"),
    "damage": (
        "a flipped bit",
        "a lost end",
        "another engine's file",
        "another engine's key",
        "a lost key",
    ),
}
"""Argument of tests -> values that they run with."""


class Export:
    """An export, its data set, and engines of it in a folder of their own."""

    def __init__(self, folder: Path, data_dir: Path, timings: Path | None = None):
        self._timings = timings
        self.manifest, in_pytorch = read_export(folder)

        # the data set, and the images that ranges were calibrated on
        info = self.manifest.data
        data = load_data(info.dataset, data_dir, info.img_size, info)
        self.images, self.labels = data.test_images, data.test_labels
        train_part, _ = dataset.split_train(data.train_labels, info.split_seed)
        first = train_part[: self.manifest.quantization.calib_images]
        self.calibration = data.train_images[first]

        # what engines are compared with
        self.references = {}
        for name in self.precisions:
            reference = in_pytorch.get(PRECISIONS[name].in_pytorch, in_pytorch["FP32"])
            self.references[name] = reference
        if (folder / REFERENCE).is_file():
            with np.load(folder / REFERENCE) as arrays:
                self.references |= dict(arrays)

        # a folder with the same graphs, for engines
        self._temporary = tempfile.TemporaryDirectory()
        self._networks = {}
        self._predictions = {}
        for path in folder.glob("*.onnx"):
            (Path(self._temporary.name) / path.name).symlink_to(path.resolve())

    @property
    def precisions(self) -> list[str]:
        """Those that the export has a graph for."""
        present = []
        for name, precision in PRECISIONS.items():
            if not precision.int8 or name in self.manifest.int8_nodes:
                present.append(name)
        return present

    def load(self, precision: str) -> TensorRTNetwork:
        """The engine, read from the folder or built into it."""
        if precision not in (*self.precisions, IMPLICIT):
            raise SkipTest(f"{precision} is not in this export")
        options = EngineOptions(precision, SIZES, level=LEVEL)
        folder = Path(self._temporary.name)
        return TensorRTNetwork(folder, options, self.calibration, self._timings)

    def network(self, precision: str) -> TensorRTNetwork:
        """The engine, loaded once."""
        if precision not in self._networks:
            self._networks[precision] = self.load(precision)
        return self._networks[precision]

    def predictions(self, precision: str) -> np.ndarray:
        """Of the whole test set, at the largest batch size."""
        if precision not in self._predictions:
            predicted = predict(self.network(precision), self.images, SIZES[-1])
            self._predictions[precision] = predicted
        return self._predictions[precision]

    def accuracy_pct(self, predictions: np.ndarray) -> float:
        return percent_equal(predictions, self.labels)


def in_batches(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + SIZES[-1]] for start in range(0, len(images), SIZES[-1])]


def assert_agree(predictions: np.ndarray, reference: np.ndarray, least_pct: float) -> None:
    agreement_pct = percent_equal(predictions, reference)
    assert agreement_pct >= least_pct, (
        f"{agreement_pct:.2f} % of the predictions agree, less than {least_pct} %"
    )


def test_predictions_agree_with_the_reference(export, precision):
    assert_agree(export.predictions(precision), export.references[precision], AGREEMENT_PCT)


def test_accuracy_is_that_of_the_reference(export, precision):
    engine_pct = export.accuracy_pct(export.predictions(precision))
    reference_pct = export.accuracy_pct(export.references[precision])
    assert abs(engine_pct - reference_pct) <= ACCURACY_POINTS, (
        f"{engine_pct:.2f} %, the reference has {reference_pct:.2f} %"
    )


def test_every_node_that_is_meant_for_int8_runs_in_it(export, int8):
    network = export.network(int8)
    nodes = export.manifest.int8_nodes[int8]
    missing = network.float_nodes(nodes)
    layers = "\n".join(map(str, network.layers))
    assert len(nodes) > 0
    assert missing == [], f"{len(missing)} of {len(nodes)} do not: {', '.join(missing)}\n{layers}"


def test_a_cached_engine_gives_the_logits_of_the_one_just_built(export, precision):
    batches = in_batches(export.images[: 3 * SIZES[-1]])
    fresh = np.concatenate(list(export.network(precision).stream(batches)))
    with never_built():
        cached = export.load(precision)
    assert cached.path == export.network(precision).path
    assert np.array_equal(np.concatenate(list(cached.stream(batches))), fresh)


def never_built():
    """Meanwhile, building an engine is an error."""
    error = AssertionError("it was built again")
    return mock.patch.object(tensorrt_build, "build_plan", side_effect=error)


def key_of(path: Path) -> Path:
    """The file beside an engine that says what it is."""
    return path.with_name(f"{path.name}.json")


def do_damage(path: Path, damage: str, other: Path) -> None:
    """Damage an engine's file or its key, by what is those of the `other` engine."""
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "a flipped bit":
        flipped = bytes([content[middle] ^ 1])
        path.write_bytes(content[:middle] + flipped + content[middle + 1 :])
    elif damage == "a lost end":
        path.write_bytes(content[:middle])
    elif damage == "another engine's file":
        path.write_bytes(other.read_bytes())
    elif damage == "another engine's key":
        path.write_bytes(other.read_bytes())
        key_of(path).write_bytes(key_of(other).read_bytes())
    else:
        key_of(path).unlink()


def test_a_damaged_engine_file_is_built_again(export, damage):
    path = export.network("FP16").path
    expected = export.predictions("FP16")
    do_damage(path, damage, export.network("FP32").path)
    before = path.stat()
    build_plan = tensorrt_build.build_plan
    with mock.patch.object(tensorrt_build, "build_plan", wraps=build_plan) as build:
        network = export.load("FP16")
        export.load("FP16")
    assert build.call_count == 1, f"it was built {build.call_count} times"
    assert network.path == path
    assert path.stat().st_mtime_ns > before.st_mtime_ns
    assert_agree(predict(network, export.images, SIZES[-1]), expected, BATCH_AGREEMENT_PCT)


def test_an_engine_file_is_a_plan_that_any_tensorrt_runtime_loads(export, precision):
    plan = export.network(precision).path.read_bytes()
    trt = load_tensorrt()
    log = tensorrt_build.make_logger(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    assert engine is not None, log.last_error
    assert engine.num_optimization_profiles == len(SIZES)


def test_a_stream_with_a_ragged_end_gives_what_single_batches_give(export, precision):
    network = export.network(precision)
    size = SIZES[-1]
    batches = in_batches(export.images[: 3 * size - 91])
    streamed = list(network.stream(batches))
    assert [len(logits) for logits in streamed] == [size, size, size - 91]
    for logits, batch in zip(streamed, batches, strict=True):
        padded = np.resize(batch, (size, *batch.shape[1:]))
        assert np.array_equal(network(padded)[: len(batch)], logits)
    ragged = network(batches[-1])  # in a context for this size alone
    off = np.abs(ragged - streamed[-1]).max() / np.ptp(streamed[-1])
    assert off < 0.05, f"logits are off by {off:.1%} of their spread"


def test_batch_1_predicts_what_batch_128_does(export, precision):
    one_by_one = predict(export.network(precision), export.images, 1)
    assert_agree(one_by_one, export.predictions(precision), BATCH_AGREEMENT_PCT)


def test_latencies_are_positive(export, precision):
    for size in SIZES:
        times_ms = export.network(precision).latencies_ms(export.images[:size])
        assert len(times_ms) >= MIN_RUNS
        assert (times_ms > 0).all(), f"a run at batch size {size} took {times_ms.min()} ms"


def test_implicit_calibration_keeps_the_accuracy_where_the_version_has_it(export):
    try:
        export.network(IMPLICIT)
    except UserError as error:
        refused = "has no calibrators any more" in str(error)
        if refused and not hasattr(load_tensorrt(), "IInt8EntropyCalibrator2"):
            return
        raise
    implicit_pct = export.accuracy_pct(export.predictions(IMPLICIT))
    fp32_pct = export.accuracy_pct(export.predictions("FP32"))
    assert abs(implicit_pct - fp32_pct) <= IMPLICIT_POINTS, (
        f"{implicit_pct:.2f} %, FP32 has {fp32_pct:.2f} %"
    )
    with never_built():
        export.load(IMPLICIT)


def write_reference(folder: Path, data_dir: Path) -> None:
    """ONNX Runtime's predictions for each precision, to `onnxruntime.npz` in the export."""
    from utils.backends.onnxruntime import OnnxRuntimeNetwork

    export = Export(folder, data_dir)
    predictions = {}
    for name in export.precisions:
        network = OnnxRuntimeNetwork(folder / graph_file(name))
        title = f"onnxruntime {name}"
        predictions[name] = predict(network, export.images, REFERENCE_BATCH, title)
        print(f"{name}: {export.accuracy_pct(predictions[name]):.2f} %")
    with atomic_path(folder / REFERENCE) as partial, partial.open("wb") as file:
        np.savez(file, **predictions)


def run_one(test, export: Export, **arguments: str) -> str:
    """Run a test and print a line of it; returns passed, failed or skipped."""
    name = test.__name__
    if arguments:
        name += f"[{', '.join(arguments.values())}]"
    start = time.perf_counter()
    outcome = "passed"
    reason = ""
    try:
        test(export=export, **arguments)
    except SkipTest as skip:
        outcome = "skipped"
        reason = f": {skip}"
    except Exception as error:
        outcome = "failed"
        reason = f": {type(error).__name__}: {error}"
        traceback.print_exc()
    seconds = time.perf_counter() - start
    print(f"{outcome.upper()} {name} {seconds:.1f} s{reason}", flush=True)
    return outcome


def run_all(export: Export) -> int:
    """Run every test with every value of its argument; returns the exit code."""
    outcomes = []
    for test in [value for name, value in globals().items() if name.startswith("test_")]:
        parameters = inspect.signature(test).parameters
        names = [name for name in parameters if name in PARAMETERS]
        if not names:
            outcomes.append(run_one(test, export))
        for name in names:
            outcomes += [run_one(test, export, **{name: value}) for value in PARAMETERS[name]]
    counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    return int(counts["failed"] > 0)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT_DIR")
    parser.add_argument("data", type=Path, metavar="DATA_DIR")
    parser.add_argument(
        "--timing_cache",
        type=Path,
        metavar="DIR",
        help="kernel timings of earlier builds, to build faster",
    )
    parser.add_argument(
        "--reference", action="store_true", help="write ONNX Runtime's predictions into EXPORT_DIR"
    )
    args = parser.parse_args()
    if args.reference:
        write_reference(args.export, args.data)
        return 0
    return run_all(Export(args.export, args.data, args.timing_cache))


if __name__ == "__main__":
    sys.exit(main())

try:
    import pytest
except ImportError:
    pass  # where pytest is not installed, it does not read this file
else:
    pytestmark = pytest.mark.gpu

    def pytest_generate_tests(metafunc):
        for name in set(PARAMETERS) & set(metafunc.fixturenames):
            metafunc.parametrize(name, PARAMETERS[name])

    @pytest.fixture(scope="module")
    def export():
        if "EXPORT_DIR" not in os.environ or "DATA_DIR" not in os.environ:
            pytest.skip("EXPORT_DIR and DATA_DIR name no export to test")
        return Export(Path(os.environ["EXPORT_DIR"]), Path(os.environ["DATA_DIR"]))
