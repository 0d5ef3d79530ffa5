"""A checkpoint exported, its networks evaluated on a back end, and the rows and record of it.

Only `export_checkpoint` needs torch: exported networks are evaluated where it is not installed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import dataset
from utils import records
from utils.backends.network import (
    EVALUATION_BATCH,
    Network,
    end_to_end_img_s,
    predict,
    repeated,
)
from utils.engine_layers import audit_lines
from utils.errors import UserError
from utils.files import sha256, staged
from utils.flags import BACKENDS, PTC_MODES, Flags
from utils.manifest import IMPLICIT, INT8, MANIFEST, PRECISIONS, PREDICTIONS, Manifest, graph_file
from utils.metrics import percent_equal
from utils.records import Engine, Record, Row
from utils.specs import DataSpec, Quantization

if TYPE_CHECKING:
    from torch import nn

    from utils.checkpoint import Checkpoint

NO_IMAGES = np.empty((0, 0, 0, 3), np.uint8)

LARGEST_LOSS_PCT = 2.0
"""Of accuracy, in points, below the same network in PyTorch: rounding alone loses less."""

MOST_CHANGED_PCT = 10.0
"""Of predictions that are not those of the same network in PyTorch. 4 % are the most that was seen,
of networks that were hardly trained."""
FEW_CHANGED = 8
"""Predictions, which of few images may change by chance."""

RANDOM_BATCHES = 8
"""Of the largest size: enough that a back end works on several at a time."""


@dataclass(frozen=True)
class Comparison:
    """What to run of an export, on which back end, and how to time it.

    Args:
        precisions: of `PRECISIONS`; none: every one that is exported.
        backend: one of `BACKENDS`; "auto" is the first of them that can run here.
        ptc_mode: "implicit" adds an engine by TensorRT's own calibration.
        batch_sizes: of the latencies; none: accuracy only.
        remainder: "fp16" or "fp32", what TensorRT computes the unquantized layers in.
        workspace_gb: TensorRT's limit of scratch memory.
        opt_level: of TensorRT's builder, 0 to 5.
        tiling_level, l2_limit_mb: as TensorRT's `EngineOptions` has them.
        timing_cache: a folder of kernel timings to share between exports.
        audit: whether to list engine layers, and to fail if one meant for INT8 is not.
        report: a page that shows engine layers; None: there is none.
        torch_compile: batch sizes at which PyTorch's own FP16 is timed, eager and compiled.
    """

    precisions: Sequence[str] = ()
    backend: str = "auto"
    ptc_mode: str = "explicit"
    batch_sizes: Sequence[int] = (1, 128)
    remainder: str = "fp16"
    workspace_gb: float = 4.0
    opt_level: int = 3
    tiling_level: int = 0
    l2_limit_mb: float | None = None
    timing_cache: Path | None = None
    audit: bool = False
    report: Path | None = None
    torch_compile: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS or self.ptc_mode not in PTC_MODES:
            raise UserError(f"backend {self.backend!r} or ptc_mode {self.ptc_mode!r} cannot be")

    @classmethod
    def of(cls, flags: Flags) -> Comparison:
        """What the flags say; where there is no such flag, the default."""
        given = {field.name: getattr(flags, field.name, None) for field in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @property
    def largest_batch(self) -> int:
        """The largest batch size that is timed; where none is, that of evaluations."""
        return max(self.batch_sizes, default=EVALUATION_BATCH)

    @property
    def wanted(self) -> list[str]:
        """The precisions to run in the table's order, implicit calibration after INT8-PTC."""
        named = self.precisions or PRECISIONS
        wanted = [name for name in PRECISIONS if name in named]
        if self.ptc_mode == "implicit":
            wanted.insert(wanted.index("INT8-PTC") + 1, IMPLICIT)
        return wanted


def tensorrt_flag(options: Any) -> str:
    """What only TensorRT can obey, of flags or a `Comparison`; "" if there is nothing."""
    if options.backend == "tensorrt":
        return "--backend tensorrt"
    return "--ptc_mode implicit" if options.ptc_mode == "implicit" else ""


NO_AUDIT = "--audit: ONNX Runtime does not tell what it runs; that needs TensorRT or OpenVINO"


def comparison_refusals(flags: Flags) -> Iterator[str]:
    implicit = flags.ptc_mode == "implicit"
    if implicit and flags.precisions and "INT8-PTC" not in flags.precisions:
        yield "--ptc_mode implicit is a second --INT8PTC: name that too, or drop it"
    if flags.backend in ("openvino", "onnxruntime") and tensorrt_flag(flags):
        yield f"{tensorrt_flag(flags)} is TensorRT's: drop it or --backend"
    # train.py has no --audit
    if flags.backend == "onnxruntime" and getattr(flags, "audit", False):
        yield NO_AUDIT


def load_data(
    name: str,
    data_dir: Path,
    img_size: Sequence[int] | None,
    known: DataSpec | None,
    other_images: bool = False,
    mend: str = "",
    test_digest: str | None = None,
) -> dataset.ImageData:
    """A data set, which must be the one that a checkpoint or an export was made with.

    Args:
        img_size: height and width that a folder's images are resized to.
        known: the images that a checkpoint or an export was made with; None: there is none.
        other_images: the images may be others, of the same classes.
        mend: what a user of other images can do, beside naming the same ones.
        test_digest: where the test images alone count: their digest.

    Raises:
        UserError: the files hold something else, or cannot be read.
    """
    data = dataset.load(name, data_dir, img_size, test_only=test_digest is not None)
    if known is None:
        return data
    others = f", or {mend}" if mend else ""
    if list(data.classes) != known.classes:
        what = "classes differ from those that were trained on"
        raise UserError(f"--data_dir {data_dir}: {what}; name those{others}")
    if test_digest is not None:
        same = test_digest == data.test_digest()
    else:
        same = other_images or known.digest in (None, data.digest())
    if not same:
        what = "other images, or in another order, than the checkpoint or export was made with"
        raise UserError(f"--data_dir {data_dir}: {what}; name those{others}")
    return data


def export_folder(checkpoint: Path) -> Path:
    """Where a checkpoint is exported to, unless the user names a folder."""
    return checkpoint.with_name(f"{checkpoint.name}_onnx")


def export_checkpoint(
    checkpoint: Checkpoint,
    data: dataset.ImageData,
    quantization: Quantization,
    comparison: Comparison,
    folder: Path,
) -> None:
    """Evaluate a checkpoint's networks in PyTorch and export them to `folder`, which is locked.

    Raises:
        UserError: as `restore` in `utils/networks.py`.
    """
    from utils.networks import batches_of, restore
    from utils.quantization.codes import layer_facts
    from utils.quantization.export import export_onnx, int8_nodes

    info = checkpoint.data
    wanted = comparison.wanted
    if checkpoint.quantization and checkpoint.epoch == 0 and "INT8-QAT" in wanted:
        # only calibrated, whatever it is called
        print("this checkpoint is of epoch 0: its INT8-QAT is its INT8-PTC")
        if "INT8-QAT" not in comparison.precisions:
            wanted.remove("INT8-QAT")
    quantization, networks = restore(checkpoint, data, quantization, wanted)
    rows, predictions = evaluate_in_pytorch(networks, data, info, comparison)

    # val images show how codes are used
    _, val = data.split(info.split_seed)
    images = next(batches_of(*val, info).first(EVALUATION_BATCH))
    nodes, layers = {}, {}
    with staged(folder, MANIFEST) as draft:
        for precision, network in networks.items():
            path = draft / graph_file(precision)
            export_onnx(network, path, data.train_images.shape[1:3], info.mean, info.std)
            nodes[precision] = int8_nodes(path, network)
            if precision in INT8:
                layers[precision] = layer_facts(network, images)
        np.savez(draft / PREDICTIONS, **predictions)
        manifest = Manifest(
            model=checkpoint.network.name,
            stem=checkpoint.network.stem,
            data=replace(info, digest=data.digest()),
            seed=checkpoint.recipe["seed"],
            quantization=quantization,
            int8_nodes=nodes,
            files={path.name: sha256(path) for path in draft.iterdir()},
            environment=records.environment(["pytorch"]),
            rows=rows,
            test_digest=data.test_digest(),
            layers=layers,
        )
        records.write(draft / MANIFEST, manifest)
    # an earlier export's graphs would be taken for some of this one
    for precision, remainder in itertools.product(PRECISIONS, ("fp32", "fp16")):
        name = graph_file(precision, remainder)
        if name not in manifest.files:
            (folder / name).unlink(missing_ok=True)
    print(f"exported to {folder}")


def evaluate_in_pytorch(
    networks: dict[str, nn.Module], data: dataset.ImageData, info: DataSpec, comparison: Comparison
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows and test predictions of the networks, by precision, as PyTorch runs them.

    Fake quantization computes in float, so it gets no latency. With `torch_compile` there are
    FP16 rows of PyTorch itself, eager and compiled, to compare engines with.
    """
    from layers import FromImages
    from utils.backends.pytorch import TorchNetwork
    from utils.device import default_device

    device = default_device()
    if comparison.torch_compile and device.type != "cuda":
        raise UserError("--torch_compile compares GPU times, and there is no GPU here: drop it")

    runs = [("pytorch", precision) for precision in networks]
    if comparison.torch_compile:
        runs += [("pytorch", "FP16"), ("torch.compile", "FP16")]
    timed = {"FP32": comparison.batch_sizes, "FP16": comparison.torch_compile}

    rows: list[Row] = []
    predictions: dict[str, np.ndarray] = {}
    for backend, precision in runs:
        half = precision == "FP16"
        model = copy.deepcopy(networks["FP32" if half else precision])
        model = FromImages(model, info.mean, info.std)
        network = TorchNetwork(model.half() if half else model, device, backend)

        title = PRECISIONS[precision].in_pytorch
        batch_sizes = timed.get(precision, ())
        batch_size = max([EVALUATION_BATCH, *batch_sizes])
        predicted = predict(network, data.test_images, batch_size, f"{backend} {title}")
        # torch.compile's FP16 comes after eager's
        predictions.setdefault(title, predicted)
        row = Row(backend, title, *accuracies(predicted, data.test_labels, predictions, "FP32"))
        rows += timed_rows(row, network, data.test_images, batch_sizes)
    return rows, predictions


def accuracies(
    predicted: np.ndarray, labels: np.ndarray, predictions: dict[str, np.ndarray], reference: str
) -> tuple[float, float, float]:
    """Accuracy, what it is above FP32's, and agreement with the reference, all in percent.

    Args:
        predictions: PyTorch's.
        reference: one of them; where it is missing, FP32's stand in for it.
    """
    fp32 = predictions["FP32"]
    accuracy_pct = percent_equal(predicted, labels)
    delta_pct = accuracy_pct - percent_equal(fp32, labels)
    return accuracy_pct, delta_pct, percent_equal(predicted, predictions.get(reference, fp32))


def timed_rows(
    row: Row, network: Network, images: np.ndarray, batch_sizes: Sequence[int]
) -> list[Row]:
    """`row` with the latency percentiles at each batch size; without a batch size `row` itself."""
    rows = []
    for batch_size in batch_sizes:
        times_ms = network.latencies_ms(repeated(images, batch_size))
        p50, p99 = np.percentile(times_ms, (50, 99))
        rows.append(row.timed(batch_size, float(p50), float(p99)))
    return rows or [row]


def choose_backend(
    folder: Path,
    comparison: Comparison,
    calibration: np.ndarray = NO_IMAGES,
    engines: Path | None = None,
) -> Callable[[str], Network]:
    """A function from a precision to its network.

    "auto" is TensorRT, else OpenVINO, else ONNX Runtime, and says why it is not an earlier one.

    Args:
        calibration: images (N, H, W, 3) uint8 for TensorRT's own calibration.
        engines: TensorRT's cache; by default it is in `folder`.

    Raises:
        UserError: a back end or an audit is asked for that cannot be had here.
    """
    wanted = comparison.backend
    if wanted in ("auto", "tensorrt"):
        try:
            return _tensorrt(folder, comparison, calibration, engines)
        except UserError as error:
            if flag := tensorrt_flag(comparison):
                raise UserError(f"{flag}: {error}") from None
            print(f"TensorRT is not used: {error}")

    if wanted in ("auto", "openvino"):
        try:
            from utils.backends.openvino import checked_network

            size = comparison.largest_batch
            return lambda precision: checked_network(_graph(folder, precision), size)
        except ImportError as error:
            if wanted == "openvino":
                mend = "pip install -r requirements.txt"
                raise UserError(f"--backend openvino: {error}; {mend}") from None
            print(f"OpenVINO is not used: {error}")

    if comparison.audit:
        raise UserError(NO_AUDIT)
    from utils.backends.onnxruntime import OnnxRuntimeNetwork

    return lambda precision: OnnxRuntimeNetwork(_graph(folder, precision))


def _graph(folder: Path, precision: str) -> Path:
    """A graph's file; raises UserError if it is not there, as in a part of an export."""
    path = folder / graph_file(precision)
    if not path.exists():
        there = []
        for name, other in PRECISIONS.items():
            if (folder / graph_file(name)).exists():
                there.append(f"--{other.flag}")
        mend = f"name those that are: {', '.join(there)}" if there else "copy it there"
        raise UserError(f"{path} is not there: {mend}")
    return path


def _tensorrt(
    folder: Path, comparison: Comparison, calibration: np.ndarray, engines: Path | None
) -> Callable[[str], Network]:
    """A function from a precision to its engine; raises UserError where TensorRT cannot run."""
    from utils.backends.tensorrt_build import EngineOptions, require_gpu
    from utils.backends.tensorrt_run import TensorRTNetwork

    require_gpu()
    # without latencies an engine is needed all the same
    sizes = tuple(sorted(set(comparison.batch_sizes or [EVALUATION_BATCH])))

    def build(precision: str) -> Network:
        options = EngineOptions(
            precision,
            batch_sizes=sizes,
            remainder=comparison.remainder,
            workspace_gb=comparison.workspace_gb,
            level=comparison.opt_level,
            tiling_level=comparison.tiling_level,
            l2_limit_mb=comparison.l2_limit_mb,
        )
        return TensorRTNetwork(folder, options, calibration, comparison.timing_cache, engines)

    return build


def evaluate_network(
    network: Network,
    precision: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    predictions: dict[str, np.ndarray],
    batch_sizes: Sequence[int],
) -> list[Row]:
    """A row for each batch size with the network's own time, and one from host to host.

    The latter only where the former is the device's alone. The agreement is with what PyTorch
    predicts in the same precision or, where it was not run in that, in FP32. Prints a line if the
    network is much worse than in PyTorch.

    Args:
        images, labels: the test images (N, H, W, 3) uint8 and their classes (N,); without labels
            the images are any, and accuracy and agreement are None.
    """
    batch_size = network.evaluation_batch
    found = ()
    if labels is not None:
        predicted = predict(network, images, batch_size, f"{network.name} {precision}")
        in_pytorch = PRECISIONS[precision].in_pytorch if precision in PRECISIONS else precision
        found = accuracies(predicted, labels, predictions, in_pytorch)
        if in_pytorch in predictions:
            _say_if_other(f"{network.name} {precision}", predicted, predictions[in_pytorch], labels)
    row = Row(network.name, precision, *found, file_mb=network.path.stat().st_size / 1e6)
    if network.layers:
        row.layers = len(network.layers)
        row.int8_layers = sum(layer.precision == "INT8" for layer in network.layers)

    rows = timed_rows(row, network, images, batch_sizes)
    if network.device_time:
        end_to_end = replace(row, backend=f"{network.name} end-to-end", batch_size=batch_size)
        end_to_end.throughput_img_s = end_to_end_img_s(network, images, batch_size)
        rows.append(end_to_end)
    return rows


def _say_if_other(
    what: str, predicted: np.ndarray, in_pytorch: np.ndarray, labels: np.ndarray
) -> None:
    """Print a line if a network is much worse than the same in PyTorch, or predicts otherwise.

    Rounding alone changes predictions to the better as often as to the worse: of d changes, it
    loses 3 sqrt(d) or more hardly ever.
    """
    lost = int((in_pytorch == labels).sum() - (predicted == labels).sum())
    lost_pct = 100 * lost / len(labels)
    changed = int((predicted != in_pytorch).sum())
    changed_pct = 100 * changed / len(labels)
    mend = "try other --skip_layers, or another version of the back end"
    if lost_pct > LARGEST_LOSS_PCT and lost > 3 * changed**0.5:
        print(f"{what} is {lost_pct:.2f} points below the same network in PyTorch; {mend}")
    elif changed_pct > MOST_CHANGED_PCT and changed > FEW_CHANGED:
        other = "are not what the same network predicts in PyTorch"
        print(f"{what}: {changed_pct:.0f} % of its predictions {other}; {mend}")


def evaluate_export(
    folder: Path,
    manifest: Manifest,
    predictions: dict[str, np.ndarray],
    data: dataset.ImageData | None,
    comparison: Comparison,
) -> tuple[list[Row], list[Engine]]:
    """Evaluate exported files on a back end, while their folder is locked.

    Args:
        manifest, predictions: of the export, as `read_export` returns them.
        data: None: random images are timed, and there are no accuracies.

    Returns:
        The rows and, for an audit or a report, what the back end runs of each precision.

    Raises:
        UserError: the export is of other test images, or lacks a precision that is asked for by
            name; implicit calibration has no train images.
    """
    if data is None:
        count = RANDOM_BATCHES * comparison.largest_batch
        images, labels = random_images(manifest.data, count), None
    else:
        images, labels = data.test_images, data.test_labels
        _require_predictions(folder, predictions, data)
    _require_precisions(folder, manifest, comparison.precisions)
    # TensorRT's own calibration sees the images that ours saw
    calibration = NO_IMAGES
    if comparison.ptc_mode == "implicit":
        if data is None:
            raise UserError("--ptc_mode implicit needs the train images: name them with --data_dir")
        train_part, _ = dataset.split_train(data.train_labels, manifest.data.split_seed)
        calibration = data.train_images[train_part[: manifest.quantization.calib_images]]
    backend = choose_backend(folder, comparison, calibration)

    rows: list[Row] = []
    engines: list[Engine] = []
    for precision in comparison.wanted:
        if manifest.lacks(precision):
            print(f"{precision}: not in this export, no row")
            continue
        network = backend(precision)
        sizes = comparison.batch_sizes
        rows += evaluate_network(network, precision, images, labels, predictions, sizes)
        if comparison.audit or (comparison.report and network.layers):
            nodes = manifest.int8_nodes.get(precision, [])
            engines.append(engine_of(network, precision, nodes))
        if comparison.audit:
            print(f"{precision}, batch size {engines[-1].batch_size}, each layer timed alone")
            # float networks have the layers of the INT8 ones
            layers = manifest.layers.get(precision) or next(iter(manifest.layers.values()), [])
            print(*audit_lines(engines[-1], layers), sep="\n")
    return rows, engines


def random_images(info: DataSpec, count: int) -> np.ndarray:
    """Noise (count, H, W, 3) uint8 of an export's size, the same in every run."""
    return np.random.default_rng(0).integers(0, 256, (count, *info.size, 3), dtype=np.uint8)


def _require_predictions(
    folder: Path, predictions: dict[str, np.ndarray], data: dataset.ImageData
) -> None:
    for title, predicted in predictions.items():
        fits = predicted.shape == data.test_labels.shape and predicted.dtype.kind == "i"
        if not fits or not set(predicted) <= set(range(len(data.classes))):
            raise UserError(f"{folder}: predictions of {title} are not one class for each image")


def _require_precisions(folder: Path, manifest: Manifest, precisions: Sequence[str]) -> None:
    for precision in precisions:
        if manifest.lacks(precision):
            flag = PRECISIONS[precision].flag
            raise UserError(f"{precision} is not in {folder}: export it again, with --{flag}")


def load_network(folder: Path, manifest: Manifest, comparison: Comparison) -> tuple[Network, str]:
    """One network of an export, and its precision, while the export's folder is locked.

    It is the precision that `comparison` names, else the best of those that are there: INT8 of QAT,
    then INT8 by calibration, then FP32.

    Raises:
        UserError: it is not there, or the back end cannot run it.
    """
    _require_precisions(folder, manifest, comparison.precisions)
    precision = "FP32"
    for name in INT8:
        files = [folder / graph_file(name), folder / graph_file(name, "fp16")]
        # a deployment may have but one of the graphs
        if name in manifest.int8_nodes and any(file.exists() for file in files):
            precision = name
    if comparison.precisions:
        precision = comparison.precisions[-1]
    return choose_backend(folder, comparison)(precision), precision


def classified(
    network: Network, batches: Iterable[tuple[list[Path], np.ndarray]], num_classes: int
) -> Iterator[tuple[Path, int, float]]:
    """File, predicted class and its probability, the softmax of the logits, of each image.

    Args:
        batches: files, and images (B, H, W, 3) uint8.

    Raises:
        UserError: the network has other than `num_classes` classes.
    """
    # a back end may take a batch before it is done with the one before
    read, named = itertools.tee(batches)
    logits_of_batches = network.stream(images for _, images in read)
    for logits, (files, _) in zip(logits_of_batches, named, strict=True):
        if logits.shape[1] != num_classes:
            there = f"{network.path} has {logits.shape[1]} classes"
            raise UserError(f"{there}, not {num_classes}: export it again")
        # less the largest, so that no exponential overflows
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        probabilities = exponentials.max(1) / exponentials.sum(1)
        yield from zip(files, logits.argmax(1).tolist(), probabilities.tolist(), strict=True)


def engine_of(network: Network, precision: str, nodes: Sequence[str]) -> Engine:
    """What the network runs: each layer's time alone, in sum more than all together take.

    Args:
        nodes: of its graph, those that are meant to run in INT8.
    """
    timed = zip(network.layers, network.layer_times_ms(), strict=True)
    layers = [replace(layer, ms=ms) for layer, ms in timed]
    missed = network.float_nodes(nodes)
    return Engine(network.name, precision, network.evaluation_batch, layers, missed)


def make_record(
    manifest: Manifest,
    rows: list[Row],
    flags: dict[str, str] | None = None,
    engines: Sequence[Engine] = (),
) -> Record:
    """A record of the PyTorch rows that an export holds, of `rows` and of `engines`.

    Args:
        flags: those of the command line that have a value.
    """
    environment, torch_rows = records.merge_environment(manifest.environment, manifest.rows, rows)
    return Record(
        model=manifest.model,
        stem=manifest.stem,
        dataset=manifest.data.dataset,
        seed=manifest.seed,
        quantization=manifest.quantization,
        flags=flags or {},
        commit=records.commit(),
        environment=environment,
        rows=torch_rows + rows,
        engines=list(engines),
    )


def print_record(record: Record) -> None:
    """What was compared, as a table."""
    print(f"{record.model} ({record.stem} stem) on {record.dataset}, test set")
    print(records.text_table(records.cells_of(record.rows), names=2), flush=True)
