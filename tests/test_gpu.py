"""Engines on a GPU, against what ONNX Runtime or PyTorch predicts of the same networks on the whole test set.

Needs TensorRT, PyCUDA, NumPy and tqdm, neither torch nor onnx, and pytest only if pytest runs it:

    EXPORT_DIR=... DATA_DIR=... python -m pytest -m gpu
    python tests/test_gpu.py EXPORT_DIR DATA_DIR                one line for each test, without pytest
    python tests/test_gpu.py --reference EXPORT_DIR DATA_DIR    write ONNX Runtime's predictions there, on any machine with it

EXPORT_DIR is what `infer.py --export_only` wrote, DATA_DIR where its test images are. Without ONNX Runtime's predictions
the reference is PyTorch's. Engines are built anew in a temporary folder: what is in EXPORT_DIR is only read.
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
import infer
from utils.backends import network as measure
from utils.backends import tensorrt as engines
from utils.errors import UserError
from utils.files import atomic_path

REFERENCE = "onnxruntime.npz"
SIZES, LEVEL, REFERENCE_BATCH = (1, 128), 2, 1000
AGREEMENT_PCT, ACCURACY_POINTS, BATCH_AGREEMENT_PCT, IMPLICIT_POINTS = 99.5, 0.1, 99.9, 1.0
IMPLICIT = "INT8-PTC-IMPLICIT"
PARAMETERS = {
    "precision": ("FP32", "FP16", "INT8-PTC", "INT8-QAT"),
    "int8": ("INT8-PTC", "INT8-QAT"),
    "damage": ("a flipped bit", "a lost end", "another engine's file"),
}
"""Argument of tests -> values that they run with."""


class Export:
    """An export, its data set, and engines of it in a folder of their own."""

    def __init__(self, folder: Path, data_dir: Path, timings: Path | None = None):
        self._timings = timings
        self.manifest, in_torch = infer.read_export(folder)
        info = self.manifest["data"]
        data = dataset.load(info["dataset"], data_dir, info["img_size"])
        chosen, _ = dataset.split_train(data.train_labels, info["split_seed"])
        self.calibration = data.train_images[
            chosen[: self.manifest["quantization"]["calib_images"]]
        ]
        self.images, self.labels = data.test_images, data.test_labels
        self.references = {name: in_torch[infer.FAKE.get(name, "FP32")] for name in self.precisions}
        if (folder / REFERENCE).is_file():
            with np.load(folder / REFERENCE) as arrays:
                self.references |= dict(arrays)
        self._temporary = tempfile.TemporaryDirectory()
        self._networks, self._predictions = {}, {}
        for path in folder.glob("*.onnx"):
            (Path(self._temporary.name) / path.name).symlink_to(path.resolve())

    @property
    def precisions(self) -> list[str]:
        return [
            name
            for name in PARAMETERS["precision"]
            if (name if name in infer.FAKE else "FP32") in self.manifest["int8_nodes"]
        ]

    def load(self, precision: str) -> engines.TensorRTNetwork:
        """The engine, read from the folder or built into it."""
        if precision not in (*self.precisions, IMPLICIT):
            raise SkipTest(f"{precision} is not in this export")
        options = engines.EngineOptions(precision, SIZES, level=LEVEL)
        return engines.TensorRTNetwork(
            Path(self._temporary.name), options, self.calibration, self._timings
        )

    def network(self, precision: str) -> engines.TensorRTNetwork:
        """The engine, loaded once."""
        if precision not in self._networks:
            self._networks[precision] = self.load(precision)
        return self._networks[precision]

    def predictions(self, precision: str) -> np.ndarray:
        """Of the whole test set, at the largest batch size."""
        if precision not in self._predictions:
            self._predictions[precision] = measure.predict(
                self.network(precision), self.images, SIZES[-1]
            )
        return self._predictions[precision]

    def accuracy_pct(self, predictions: np.ndarray) -> float:
        return measure.percent_equal(predictions, self.labels)


def in_batches(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + SIZES[-1]] for start in range(0, len(images), SIZES[-1])]


def assert_agree(predictions: np.ndarray, reference: np.ndarray, least_pct: float) -> None:
    agreement_pct = measure.percent_equal(predictions, reference)
    assert agreement_pct >= least_pct, (
        f"{agreement_pct:.2f} % of the predictions agree, less than {least_pct} %"
    )


def test_predictions_agree_with_the_reference(export, precision):
    assert_agree(export.predictions(precision), export.references[precision], AGREEMENT_PCT)


def test_accuracy_is_that_of_the_reference(export, precision):
    engine_pct, reference_pct = map(
        export.accuracy_pct, (export.predictions(precision), export.references[precision])
    )
    assert abs(engine_pct - reference_pct) <= ACCURACY_POINTS, (
        f"{engine_pct:.2f} %, the reference has {reference_pct:.2f} %"
    )


def test_every_node_that_is_meant_for_int8_runs_in_it(export, int8):
    network, nodes = export.network(int8), export.manifest["int8_nodes"][int8]
    missing = network.float_nodes(nodes)
    layers = "\n".join(map(str, network.layers))
    assert len(nodes) > 0
    assert missing == [], f"{len(missing)} of {len(nodes)} do not: {', '.join(missing)}\n{layers}"


def test_a_cached_engine_gives_the_logits_of_the_one_just_built(export, precision):
    batches = in_batches(export.images[: 3 * SIZES[-1]])
    fresh = np.concatenate(list(export.network(precision).stream(batches)))
    with mock.patch.object(engines, "build_plan", side_effect=AssertionError("it was built again")):
        cached = export.load(precision)
    assert cached.path == export.network(precision).path
    assert np.array_equal(np.concatenate(list(cached.stream(batches))), fresh)


def damaged(content: bytes, damage: str, other: bytes) -> bytes:
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    return {
        "a flipped bit": flipped,
        "a lost end": content[:middle],
        "another engine's file": other,
    }[damage]


def test_a_damaged_engine_file_is_built_again(export, damage):
    path, expected = export.network("FP16").path, export.predictions("FP16")
    path.write_bytes(damaged(path.read_bytes(), damage, export.network("FP32").path.read_bytes()))
    before, content = path.stat(), path.read_bytes()
    with mock.patch.object(engines, "build_plan", wraps=engines.build_plan) as build:
        network = export.load("FP16")
        export.load("FP16")
    assert build.call_count == 1, f"it was built {build.call_count} times"
    assert path.stat().st_mtime_ns > before.st_mtime_ns
    assert path.read_bytes() != content
    assert_agree(measure.predict(network, export.images, SIZES[-1]), expected, BATCH_AGREEMENT_PCT)


def test_a_stream_with_a_ragged_end_gives_what_single_batches_give(export, precision):
    network, size = export.network(precision), SIZES[-1]
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
    assert_agree(
        measure.predict(export.network(precision), export.images, 1),
        export.predictions(precision),
        BATCH_AGREEMENT_PCT,
    )


def test_latencies_are_positive(export, precision):
    for size in SIZES:
        times_ms = export.network(precision).latencies_ms(export.images[:size])
        assert len(times_ms) >= measure.MIN_RUNS
        assert (times_ms > 0).all(), f"a run at batch size {size} took {times_ms.min()} ms"


def test_implicit_calibration_keeps_the_accuracy_where_the_version_has_it(export):
    try:
        export.network(IMPLICIT)
    except UserError as error:
        if "has no calibrators any more" not in str(error) or hasattr(
            engines.load_tensorrt(), "IInt8EntropyCalibrator2"
        ):
            raise
        return
    implicit_pct, fp32_pct = map(
        export.accuracy_pct, (export.predictions(IMPLICIT), export.predictions("FP32"))
    )
    assert abs(implicit_pct - fp32_pct) <= IMPLICIT_POINTS, (
        f"{implicit_pct:.2f} %, FP32 has {fp32_pct:.2f} %"
    )
    with mock.patch.object(engines, "build_plan", side_effect=AssertionError("it was built again")):
        export.load(IMPLICIT)


def write_reference(folder: Path, data_dir: Path) -> None:
    """ONNX Runtime's predictions for each precision, to `onnxruntime.npz` in the export."""
    from utils.backends.onnxruntime import OnnxRuntimeNetwork

    export, predictions = Export(folder, data_dir), {}
    for name in export.precisions:
        network = OnnxRuntimeNetwork(folder / infer.graph_file(name))
        predictions[name] = measure.predict(
            network, export.images, REFERENCE_BATCH, f"onnxruntime {name}"
        )
        print(f"{name}: {export.accuracy_pct(predictions[name]):.2f} %")
    with atomic_path(folder / REFERENCE) as partial, partial.open("wb") as file:
        np.savez(file, **predictions)


def run_one(test, **arguments) -> str:
    """Run a test and print a line of it; returns passed, failed or skipped."""
    name = f"{test.__name__}[{', '.join(value for value in arguments.values() if isinstance(value, str))}]".replace(
        "[]", ""
    )
    start, outcome, reason = time.perf_counter(), "passed", ""
    try:
        test(**arguments)
    except SkipTest as skip:
        outcome, reason = "skipped", f": {skip}"
    except Exception as error:
        outcome, reason = "failed", f": {type(error).__name__}: {error}"
        traceback.print_exc()
    print(f"{outcome.upper()} {name} {time.perf_counter() - start:.1f} s{reason}", flush=True)
    return outcome


def run_all(export: Export) -> int:
    """Run every test with every value of its argument; returns the exit code."""
    outcomes = []
    for test in [value for name, value in globals().items() if name.startswith("test_")]:
        names = [name for name in inspect.signature(test).parameters if name in PARAMETERS]
        values = [{names[0]: value} for value in PARAMETERS[names[0]]] if names else [{}]
        outcomes += [run_one(test, export=export, **arguments) for arguments in values]
    counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
    print(
        ", ".join(
            f"{count} {outcome}"
            for outcome, count in counts.items()
            if count or outcome != "skipped"
        )
    )
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
