"""TensorRT engines, built from an exported ONNX graph and cached. Imports no torch.

One code path serves four generations, because the precision lives in the graph. What a version
lacks is asked with `hasattr`, never by its number:

    what TensorRT has                               8.6   10    11   RTX
    strongly typed networks                          -    yes   yes   yes
    builder flags INT8 and FP16, calibrators        yes   yes    -     -
    the creation flag EXPLICIT_BATCH                yes   yes    -     -
    profiles that several contexts share (preview)  yes   yes    -     -
    tiling for the L2 cache                          -    10.8   yes   yes
    REQUIRE_USER_ALLOCATION                          -     -     -    yes

Where networks are strongly typed, the graph's types are the engine's: what an INT8 engine does not
quantize, its remainder, is FP16 or FP32 as in the file. In 8.6 the graph is FP32 with Q/DQ nodes,
and builder flags allow FP16 and INT8 where it asks for them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.errors import UserError
from utils.files import atomic_path
from utils.manifest import ENGINES, IMPLICIT, graph_file

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
"""Python packages of TensorRT; the first that is installed is used."""

OWN_KERNELS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
"""Tactics that TensorRT brings itself. Those of cuBLAS and cuDNN, which 11 has no more, are used in
no version."""

CALIBRATION_BATCH = 128

INSTALL = "pip install -r requirements-gpu.txt"


@dataclass(frozen=True)
class EngineOptions:
    """What an engine depends on besides its graph.

    Args:
        precision: a record's precision: one of `PRECISIONS`, or `IMPLICIT`.
        batch_sizes: ascending; one optimization profile for each, tuned for it and good for
            smaller batches.
        remainder: "fp16" or "fp32", what an INT8 network computes in where it is not quantized.
        workspace_gb: memory that a layer may use for scratch space, in GiB.
        level: the builder's optimization level, 0 (quick) to 5 (thorough).
        tiling_level: how long to search for tiles of layers that stay in the L2 cache, 0 (not at
            all) to 3.
        l2_limit_mb: what these tiles may take of the L2 cache, in MiB; None: all.
    """

    precision: str
    batch_sizes: tuple[int, ...]
    remainder: str = "fp16"
    workspace_gb: float = 4.0
    level: int = 3
    tiling_level: int = 0
    l2_limit_mb: float | None = None

    @property
    def int8(self) -> bool:
        """Whether layers may run in INT8."""
        return self.precision.startswith("INT8")

    @property
    def fp16(self) -> bool:
        """Whether layers may run in FP16."""
        return self.precision == "FP16" or (self.int8 and self.remainder == "fp16")


# The packages


def load_tensorrt() -> ModuleType:
    """The TensorRT module that is installed.

    Raises:
        UserError: none is, or its libraries cannot be loaded.
    """
    name = next(filter(importlib.util.find_spec, MODULES), None)
    if name is None:
        raise UserError(f"the Python package tensorrt is missing (on a GPU machine: {INSTALL})")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        needs = "it wants an NVIDIA driver and its own libraries"
        raise UserError(f"{name} cannot be loaded ({error}); {needs}") from None


def load_cuda(trt: ModuleType) -> ModuleType:
    """PyCUDA's driver module, with the primary context current: the one that torch uses too.

    Raises:
        UserError: no PyCUDA, driver or GPU; or a GPU that this TensorRT does not run on.
    """
    try:
        cuda = importlib.import_module("pycuda.driver")
        importlib.import_module("pycuda.autoprimaryctx")
    except ModuleNotFoundError:
        raise UserError(
            f"the Python package pycuda is missing (on a GPU machine: {INSTALL})"
        ) from None
    except Exception as error:  # no driver: ImportError; no GPU: PyCUDA's own, known only to it
        mend = "run on a GPU machine or use --backend onnxruntime"
        raise UserError(f"there is no usable NVIDIA GPU here ({error}); {mend}") from None
    device = cuda.Context.get_device()
    major, minor = device.compute_capability()
    is_rtx = trt.__name__.startswith("tensorrt_rtx")
    # RTX knows Turing (7.5) too, but only engines that are built for Turing alone run there
    if is_rtx and (major < 8 or f"SM{major}{minor}" not in trt.ComputeCapability.__members__):
        gpu = f"{device.name()} (compute capability {major}.{minor})"
        line = f"TensorRT-RTX {trt.__version__} does not run on {gpu}"
        raise UserError(f"{line}; install tensorrt there: {INSTALL}")
    return cuda


def require_gpu() -> tuple[ModuleType, ModuleType]:
    """TensorRT and PyCUDA's driver module, ready to run.

    Raises:
        UserError: one line that says what is missing and how to get it.
    """
    trt = load_tensorrt()
    return trt, load_cuda(trt)


def strongly_typed(trt: ModuleType, precision: str) -> bool:
    """Whether the graph's types are the engine's. Implicit calibration leaves them to TensorRT."""
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    return typed and precision != IMPLICIT


def graph_name(trt: ModuleType, options: EngineOptions) -> str:
    """The exported graph that an engine is built from, see `utils.manifest`."""
    if strongly_typed(trt, options.precision):
        return graph_file(options.precision, options.remainder)
    # the builder's flags choose the types: graphs without Q/DQ nodes differ in nothing else
    explicit = options.int8 and options.precision != IMPLICIT
    return graph_file(options.precision if explicit else "FP32")


# The cache


class CacheFile:
    """A file that counts only if it was written whole, and for this key.

    The file holds its content alone: `trtexec --loadEngine` and Triton load an engine from it.
    Beside it, `<name>.json` holds the key, for people to read, and the content's SHA-256.
    """

    def __init__(self, folder: Path, name: str, key: dict[str, Any]):
        self._key = key
        stem, suffix = name.rsplit(".", 1)
        self.path = folder / f"{stem}-{_sha256(json.dumps(key).encode())[:12]}.{suffix}"
        self._sidecar = folder / f"{self.path.name}.json"

    def read(self) -> bytes | None:
        """The content, None if there is none that counts."""
        try:
            content = self.path.read_bytes()
            counts = self._sidecar.read_bytes() == self._description(content)
        except OSError:
            return None
        return content if counts else None

    def write(self, content: bytes) -> None:
        # a process that is killed on the way leaves no file that counts: the sidecar goes first
        # and comes last
        self._sidecar.unlink(missing_ok=True)
        for path, whole in ((self.path, content), (self._sidecar, self._description(content))):
            with atomic_path(path) as partial:
                partial.write_bytes(whole)

    def _description(self, content: bytes) -> bytes:
        return json.dumps({"key": self._key, "sha256": _sha256(content)}, indent=1).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cached_plan(
    trt: ModuleType,
    cuda: ModuleType,
    folder: Path,
    options: EngineOptions,
    calibration: np.ndarray,
    timings: Path | None = None,
    engines: Path | None = None,
) -> tuple[bytes, Path]:
    """An engine of one of the graphs in `folder`, and its file; built if it is not there yet.

    Args:
        calibration: images (N, H, W, 3) uint8, which only the precision `IMPLICIT` uses.
        timings: folder of the kernel timings that builds leave for later ones of like networks;
            by default each export has its own.
        engines: folder of the cache; by default it is in `folder`.

    Raises:
        UserError: the graph cannot be read, or as `build_plan` and `_make_calibrator`.
    """
    path = folder / graph_name(trt, options)
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); export it again") from None

    # three keys, each with what its file depends on: kernel times on the platform, ranges on the
    # graph and the images too, the engine on everything
    device = cuda.Context.get_device()
    platform = {
        "tensorrt": f"{trt.__name__} {trt.__version__}",
        "gpu": device.name(),
        "compute_capability": device.compute_capability(),
    }
    implicit = options.precision == IMPLICIT
    images_sha256 = _sha256(calibration.tobytes()) if implicit else None
    source = {"graph_sha256": _sha256(graph), "calibration_sha256": images_sha256, **platform}
    key = {**source, "options": asdict(options)}

    engines = engines or folder / ENGINES
    engine = CacheFile(engines, f"{options.precision.lower()}.engine", key)
    timing = CacheFile(timings or engines, "timing.cache", platform)
    table = CacheFile(engines, "calibration.cache", source)
    plan = engine.read()
    if plan is None:
        calibrator = _make_calibrator(trt, cuda, calibration, table) if implicit else None
        plan = build_plan(trt, graph, options, timing, calibrator)
        engine.write(plan)
    return plan, engine.path


# The builder


def make_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that prints nothing and keeps the last error, which explains a failure."""

    class Logger(trt.ILogger):
        last_error = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.last_error = message

    return Logger()


def _make_calibrator(
    trt: ModuleType, cuda: ModuleType, images: np.ndarray, table: CacheFile
) -> Any:
    """What feeds images (N, H, W, 3) uint8 to TensorRT's entropy calibration.

    The ranges that it finds go to `table`, which is read in its place if it holds some.

    Raises:
        UserError: this TensorRT has no calibrators.
    """
    if not hasattr(trt, "IInt8EntropyCalibrator2"):
        version = f"TensorRT {trt.__version__} has no calibrators any more"
        raise UserError(f"--ptc_mode implicit: {version}; use explicit")
    batch_size = min(CALIBRATION_BATCH, len(images))
    # whole batches only
    starts = iter(range(0, len(images) - batch_size + 1, batch_size))
    memory = cuda.mem_alloc(images[:batch_size].nbytes)

    class Calibrator(trt.IInt8EntropyCalibrator2):
        def get_batch_size(self) -> int:
            return batch_size

        def get_batch(self, names: list[str]) -> list[int] | None:
            """Device address of the next batch for the one input; None after the last."""
            start = next(starts, None)
            if start is None:
                return None
            cuda.memcpy_htod(memory, np.ascontiguousarray(images[start : start + batch_size]))
            return [int(memory)]

        def read_calibration_cache(self) -> bytes | None:
            return table.read()

        def write_calibration_cache(self, content: Any) -> None:
            table.write(bytes(content))

    return Calibrator()


def _bits(kind: Any, names: Iterable[str]) -> int:
    """The bit mask of those members of the enumeration `kind` that this version has."""
    return sum(1 << int(getattr(kind, name)) for name in names if hasattr(kind, name))


def parse(trt: ModuleType, log: Any, graph: bytes, precision: str) -> tuple[Any, Any]:
    """Builder and parsed network of an ONNX graph.

    Raises:
        UserError: TensorRT cannot start, or its parser rejects the graph; the line holds the
            parser's own words.
    """
    try:
        builder = trt.Builder(log)
    except Exception:  # pybind11 says only that a factory returned nothing
        raise UserError(f"TensorRT {trt.__version__} cannot start: {log.last_error}") from None
    typed = ["STRONGLY_TYPED"] if strongly_typed(trt, precision) else []
    flags = _bits(trt.NetworkDefinitionCreationFlag, ["EXPLICIT_BATCH", *typed])
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(graph)
    # an empty file passes for an empty graph
    if not parsed or network.num_inputs == 0:
        errors = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        reason = "; ".join(errors) or log.last_error
        raise UserError(f"TensorRT {trt.__version__} rejects the graph: {reason}")
    return builder, network


def use_hwc_format(trt: ModuleType, network: Any) -> None:
    """Let a parsed graph's images be (N, 3, H, W) in the format HWC: their bytes stay the same.

    The graph itself takes images (N, H, W, 3), casts them and transposes them. Whoever reads the
    transposed ones now reads the cast ones, and TensorRT drops the transpose.
    """
    images = network.get_input(0)
    batch, height, width, channels = images.shape
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    transpose = next(layer for layer in layers if layer.type == trt.LayerType.SHUFFLE)
    for layer in layers:
        for index in range(layer.num_inputs):
            tensor = layer.get_input(index)
            # layers have inputs that are not used
            if tensor is not None and tensor.name == transpose.get_output(0).name:
                layer.set_input(index, transpose.get_input(0))
    images.shape = (batch, channels, height, width)
    images.allowed_formats = 1 << int(trt.TensorFormat.HWC)


def configure(
    trt: ModuleType, builder: Any, network: Any, options: EngineOptions, calibrator: Any = None
) -> Any:
    """The builder's configuration.

    Raises:
        UserError: tiling is asked for, and this version has none.
    """
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * 2**30))
    config.set_tactic_sources(_bits(trt.TacticSource, OWN_KERNELS))
    config.builder_optimization_level = options.level
    # the inspector then names types and kernels
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    if options.tiling_level:
        if not hasattr(trt, "TilingOptimizationLevel"):
            version = f"TensorRT {trt.__version__} has no tiling"
            raise UserError(f"--tiling_level: {version}, 10.8 and later have; drop it")
        config.tiling_optimization_level = trt.TilingOptimizationLevel(options.tiling_level)
        if options.l2_limit_mb is not None:
            config.l2_limit_for_tiling = int(options.l2_limit_mb * 2**20)

    # without it, 8.6 runs only one batch size in each profile
    if hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806"):
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    # without it, RTX may allocate while a CUDA graph is recorded
    if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)

    if not strongly_typed(trt, options.precision):
        if options.int8:
            config.set_flag(trt.BuilderFlag.INT8)
        if options.fp16:
            config.set_flag(trt.BuilderFlag.FP16)

    for batch_size in options.batch_sizes:
        config.add_optimization_profile(_make_profile(builder, network, 1, batch_size))
    if calibrator is not None:
        config.int8_calibrator = calibrator
        batch_size = calibrator.get_batch_size()
        profile = _make_profile(builder, network, batch_size, batch_size)
        config.set_calibration_profile(profile)
    return config


def _make_profile(builder: Any, network: Any, smallest: int, largest: int) -> Any:
    """An optimization profile for batches of `smallest` to `largest` images, best at `largest`."""
    images = network.get_input(0)
    image_shape = tuple(images.shape)[1:]
    least, most = (smallest, *image_shape), (largest, *image_shape)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, least, most, most)
    return profile


def build_plan(
    trt: ModuleType, graph: bytes, options: EngineOptions, timing: CacheFile, calibrator: Any = None
) -> bytes:
    """A serialized engine; the kernel times that were measured for it are added to `timing`.

    Raises:
        UserError: the parser rejects the graph or the builder fails, and the line holds TensorRT's
            own words; or as `configure`.
    """
    log = make_logger(trt)
    what = f"{options.precision} engine"
    builder, network = parse(trt, log, graph, options.precision)
    # calibrators feed the layout of the graph
    if calibrator is None:
        use_hwc_format(trt, network)
    config = configure(trt, builder, network, options, calibrator)
    # False: times that were measured elsewhere do not count
    config.set_timing_cache(config.create_timing_cache(timing.read() or b""), False)
    # it takes up to minutes, in which TensorRT says nothing
    print(f"TensorRT builds the {what}", file=sys.stderr, flush=True)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"TensorRT {trt.__version__} cannot build the {what}: {log.last_error}")
    timing.write(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)
