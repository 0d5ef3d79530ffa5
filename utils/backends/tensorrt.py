"""TensorRT engines: built from an exported ONNX graph, cached, audited layer by layer, run and timed. Imports no torch.

One code path serves TensorRT 8.6, 10, 11 and TensorRT-RTX, because the precision lives in the graph: where the version has
strongly typed networks, the graph's types are the engine's types; where it has not (8.6), the graph is FP32 with Q/DQ nodes
and the builder flags FP16 and INT8 allow what the graph asks for. What a version lacks is asked with `hasattr`, never by
its number.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import re
import statistics
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from utils.backends.network import BURST, Network, repeated_ms
from utils.errors import UserError
from utils.files import atomic_path

INPUT, OUTPUT = "images", "logits"
MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
INT8 = ("INT8-PTC", "INT8-PTC-IMPLICIT", "INT8-QAT")
OWN_KERNELS = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
"""Tactics that TensorRT brings itself; those of cuBLAS and cuDNN, gone since version 10, are not used in any."""
CALIBRATION_BATCH = 128
TOO_LITTLE_MEMORY = "the GPU has too little memory for this engine: use a smaller --batch_size"


@dataclass(frozen=True)
class EngineOptions:
    """What an engine depends on besides its graph.

    Args:
        precision: a record's precision: FP32, FP16, INT8-PTC, INT8-PTC-IMPLICIT or INT8-QAT.
        batch_sizes: one optimization profile for each, tuned for it and good for smaller batches.
        remainder: "fp16" or "fp32", what an INT8 network computes in where it is not quantized.
        workspace_gb: memory that a layer may use for scratch space.
        level: the builder's optimization level, 0 (quick) to 5 (thorough).
    """

    precision: str
    batch_sizes: tuple[int, ...]
    remainder: str = "fp16"
    workspace_gb: float = 4.0
    level: int = 3


def load_tensorrt() -> ModuleType:
    """The TensorRT module that is installed.

    Raises:
        UserError: none is, or its libraries cannot be loaded.
    """
    name = next((name for name in MODULES if importlib.util.find_spec(name)), None)
    if name is None:
        raise UserError(
            "the Python package tensorrt is missing (on a GPU machine: pip install -r requirements-gpu.txt)"
        )
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"{name} cannot be loaded ({error}); it wants an NVIDIA driver and its own libraries"
        ) from None


def load_cuda(trt: ModuleType) -> ModuleType:
    """PyCUDA's driver module with the primary context, the one that torch uses too, current.

    Raises:
        UserError: no PyCUDA, driver or GPU; or a GPU that this TensorRT does not run on.
    """
    try:
        cuda = importlib.import_module("pycuda.driver")
        importlib.import_module("pycuda.autoprimaryctx")
    except ModuleNotFoundError:
        raise UserError(
            "the Python package pycuda is missing (pip install -r requirements-gpu.txt)"
        ) from None
    except ImportError as error:
        raise UserError(
            f"there is no NVIDIA driver here ({error}); run on a GPU machine or use --backend onnxruntime"
        ) from None
    except (
        Exception
    ) as error:  # pycuda's errors share no base class that can be named without importing it
        raise UserError(
            f"there is no usable NVIDIA GPU here ({error}); use --backend onnxruntime"
        ) from None
    device = cuda.Context.get_device()
    major, minor = device.compute_capability()
    rtx = trt.__name__.startswith(
        "tensorrt_rtx"
    )  # its engines do not run on Turing, 7.5, unless they are for that alone
    if rtx and (major < 8 or f"SM{major}{minor}" not in trt.ComputeCapability.__members__):
        raise UserError(
            f"TensorRT-RTX {trt.__version__} does not run on {device.name()} (compute capability {major}.{minor}); "
            "install tensorrt there: pip install -r requirements-gpu.txt"
        )
    return cuda


def require_gpu() -> tuple[ModuleType, ModuleType]:
    """TensorRT and PyCUDA, ready to run. Raises UserError, which says in one line what is missing and how to get it."""
    trt = load_tensorrt()
    return trt, load_cuda(trt)


def strongly_typed(trt: ModuleType, precision: str) -> bool:
    """Whether the graph's types are the engine's. Implicit calibration leaves them to the builder."""
    return (
        hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        and precision != "INT8-PTC-IMPLICIT"
    )


def graph_name(trt: ModuleType, options: EngineOptions) -> str:
    """Which exported graph an engine is built from: `<precision>.onnx`, `<precision>_fp16.onnx` for an FP16 remainder."""
    typed = strongly_typed(trt, options.precision)
    if options.precision in ("FP32", "INT8-PTC-IMPLICIT") or (
        options.precision == "FP16" and not typed
    ):
        return "fp32.onnx"
    suffix = "_fp16" if typed and options.precision in INT8 and options.remainder == "fp16" else ""
    return f"{options.precision.lower().replace('-', '_')}{suffix}.onnx"


class Store:
    """Files that are trusted only if they were written whole and for the same key; anything else counts as absent."""

    def __init__(self, folder: Path, name: str, *key: Any):
        self.key = hashlib.sha256(json.dumps(key).encode()).digest()
        stem, suffix = name.rsplit(".", 1)
        self.path = folder / f"{stem}-{self.key.hex()[:12]}.{suffix}"

    def read(self) -> bytes | None:
        content = self.path.read_bytes() if self.path.is_file() else b""
        key, digest, payload = content[:32], content[32:64], content[64:]
        return payload if key == self.key and digest == hashlib.sha256(payload).digest() else None

    def write(self, payload: bytes) -> None:
        with atomic_path(self.path) as partial:
            partial.write_bytes(self.key + hashlib.sha256(payload).digest() + payload)


def make_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that keeps the errors, of which the last explains a failure, and prints nothing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(["no reason given"], maxlen=3)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.errors.append(" ".join(message.split()))

    return Logger()


def _make_calibrator(trt: ModuleType, cuda: ModuleType, images: np.ndarray, cache: Store) -> Any:
    """Feeds images (N, H, W, 3) uint8 to TensorRT's own entropy calibration, unless `cache` holds its result."""

    class Calibrator(trt.IInt8EntropyCalibrator2):
        def __init__(self) -> None:
            trt.IInt8EntropyCalibrator2.__init__(self)
            self.shape = (min(CALIBRATION_BATCH, len(images)), *images.shape[1:])
            self.batches = iter(np.split(images, range(self.shape[0], len(images), self.shape[0])))
            self.memory = cuda.mem_alloc(int(np.prod(self.shape)))

        def get_batch_size(self) -> int:
            return self.shape[0]

        def get_batch(self, names: list[str]) -> list[int] | None:
            batch = next(self.batches, None)
            if batch is None or batch.shape != self.shape:
                return None
            cuda.memcpy_htod(self.memory, np.ascontiguousarray(batch))
            return [int(self.memory)]

        def read_calibration_cache(self) -> bytes | None:
            return cache.read()

        def write_calibration_cache(self, content: Any) -> None:
            cache.write(bytes(content))

    return Calibrator()


def parse(trt: ModuleType, log: Any, graph: bytes, precision: str) -> tuple[Any, Any]:
    """Builder and parsed network of an ONNX graph.

    Raises:
        UserError: TensorRT cannot start, or its parser rejects the graph; the line holds the parser's own words.
    """
    try:
        builder = trt.Builder(log)
    except Exception:  # pybind11 says only that a factory returned nothing
        raise UserError(f"TensorRT {trt.__version__} cannot start: {log.errors[-1]}") from None
    wanted = ("EXPLICIT_BATCH", *(("STRONGLY_TYPED",) if strongly_typed(trt, precision) else ()))
    flags = [getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in wanted]
    network = builder.create_network(sum(1 << int(flag) for flag in flags if flag is not None))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(graph)
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not parsed or network.num_inputs == 0:  # an empty file passes for an empty graph
        said = "; ".join(f"{_node(error)}{error.desc()}" for error in errors) or log.errors[-1]
        raise UserError(f"TensorRT {trt.__version__} rejects the graph: {' '.join(said.split())}")
    return builder, network


def _node(error: Any) -> str:
    """Which node a parser error is about, where the version tells."""
    said = (
        f"{error.node_operator()} {error.node_name()}".strip()
        if hasattr(error, "node_operator")
        else ""
    )
    return f"{said}: " if said else ""


def configure(
    trt: ModuleType, builder: Any, network: Any, options: EngineOptions, calibrator: Any = None
) -> Any:
    """Builder configuration: precisions, one optimization profile for each batch size, memory limit."""
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gb * 2**30))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = options.level
    if hasattr(
        trt.PreviewFeature, "PROFILE_SHARING_0806"
    ):  # else 8.6 runs only one batch size in each profile
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
    if hasattr(
        trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"
    ):  # or RTX may allocate while a CUDA graph is recorded
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    sources = [
        getattr(trt.TacticSource, name) for name in OWN_KERNELS if hasattr(trt.TacticSource, name)
    ]
    config.set_tactic_sources(sum(1 << int(source) for source in sources))
    if not strongly_typed(trt, options.precision):
        if options.precision in INT8:
            config.set_flag(trt.BuilderFlag.INT8)
        if options.precision == "FP16" or (
            options.precision in INT8 and options.remainder == "fp16"
        ):
            config.set_flag(trt.BuilderFlag.FP16)

    def profile(least: int, most: int) -> Any:
        images, profile = network.get_input(0), builder.create_optimization_profile()
        profile.set_shape(
            images.name, *((size, *tuple(images.shape)[1:]) for size in (least, most, most))
        )
        return profile

    for batch_size in options.batch_sizes:
        config.add_optimization_profile(profile(1, batch_size))
    if calibrator is not None:
        config.int8_calibrator = calibrator
        config.set_calibration_profile(
            profile(calibrator.get_batch_size(), calibrator.get_batch_size())
        )
    return config


def build_plan(
    trt: ModuleType,
    graph: bytes,
    options: EngineOptions,
    timing: Store,
    what: str,
    calibrator: Any = None,
) -> bytes:
    """A serialized engine, built under a clock.

    Raises:
        UserError: the parser rejects the graph or the builder fails; the line holds TensorRT's own words.
    """
    log = make_logger(trt)
    builder, network = parse(trt, log, graph, options.precision)
    config = configure(trt, builder, network, options, calibrator)
    config.set_timing_cache(config.create_timing_cache(timing.read() or b""), False)
    done = threading.Event()
    with tqdm(desc=f"build {what}", bar_format="{desc} {elapsed}", leave=False) as bar:
        clock = threading.Thread(
            target=lambda: [bar.refresh() for _ in iter(lambda: done.wait(0.5), True)], daemon=True
        )
        clock.start()
        try:
            plan = builder.build_serialized_network(network, config)
        finally:
            done.set()
            clock.join()
    if plan is None:
        raise UserError(f"TensorRT {trt.__version__} cannot build the {what}: {log.errors[-1]}")
    timing.write(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def cached_plan(
    trt: ModuleType,
    cuda: ModuleType,
    path: Path,
    options: EngineOptions,
    folder: Path,
    calibration: np.ndarray,
    timings: Path | None = None,
) -> tuple[bytes, Path]:
    """The engine of the graph at `path` from `folder`, built if it is not there; and the file that holds it.

    Args:
        timings: folder of the kernel timings that builds leave for later ones of like networks, `folder` by default.
        calibration: images (N, H, W, 3) uint8, which only the precision INT8-PTC-IMPLICIT uses.

    Raises:
        UserError: as `build_plan`; or implicit calibration where the version has none.
    """
    try:
        graph = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); export it again") from None
    device = cuda.Context.get_device()
    platform = [trt.__name__, trt.__version__, device.name(), list(device.compute_capability())]
    implicit = options.precision == "INT8-PTC-IMPLICIT"
    if implicit and not hasattr(trt, "IInt8EntropyCalibrator2"):
        raise UserError(
            f"--ptc_mode implicit: TensorRT {trt.__version__} has no calibrators any more; use explicit"
        )
    source = [
        hashlib.sha256(content).hexdigest()
        for content in (graph, calibration.tobytes() if implicit else b"")
    ]
    store = Store(folder, f"{options.precision.lower()}.engine", source, platform, asdict(options))
    plan = store.read()
    if plan is None:
        table = Store(folder, "calibration.cache", source, platform)
        calibrator = _make_calibrator(trt, cuda, calibration, table) if implicit else None
        timing = Store(timings or folder, "timing.cache", platform)
        plan = build_plan(trt, graph, options, timing, f"{options.precision} engine", calibrator)
        store.write(plan)
    return plan, store.path


@dataclass(frozen=True)
class Layer:
    """One layer of an engine, as its inspector tells it. `precision` is the type of its first input, else of its weights."""

    name: str
    kind: str
    precision: str
    tactic: str

    def __str__(self) -> str:
        return f"{self.precision:5} {self.kind:24} {self.name}  {self.tactic}"


def printable(name: str) -> str:
    return re.sub(r"[\x00-\x1f]+", " ", name).strip()


def parse_layer(told: str | None) -> Layer:
    """A layer of an engine from its inspector's JSON, whose keys differ between versions; of no precision if that is empty."""
    try:
        layer = json.loads(told or "", strict=False)  # 8.6 leaves control characters in its strings
    except ValueError:
        return Layer("(TensorRT tells nothing of this layer)", "-", "-", "-")
    if isinstance(layer, str):
        raise UserError(
            "the engine was built without layer information; delete it and build it again"
        )
    tensors = (*layer.get("Inputs", [])[:1], layer.get("Weights") or {})
    types = " ".join(str(v) for tensor in tensors for k, v in tensor.items() if "type" in k.lower())
    found = re.search(r"uint8|int8|fp16|half|fp32|float|int32|bool", types.lower())
    precision = {"half": "fp16", "float": "fp32"}.get(found[0], found[0]) if found else "-"
    tactic = layer.get("TacticName") or layer.get("TacticValue") or "-"
    name = printable(f"{layer['Name']} {layer.get('Metadata', '')}")
    return Layer(
        name, layer.get("ParameterType") or layer.get("LayerType", "-"), precision.upper(), tactic
    )


def profile_layers(layers: list[Layer], profile: int) -> list[Layer]:
    """Those of `layers` that an optimization profile runs: marked after the first, where each has layers of its own."""
    marked = [layer for layer in layers if f"[profile {profile}]" in layer.name]
    return marked or [layer for layer in layers if "[profile " not in layer.name]


def float_nodes(layers: list[Layer], nodes: Iterable[str]) -> list[str]:
    """Which of the graph's `nodes`, all meant to run in INT8, are in no engine layer or in one that does not.

    Copies of a layer's operands into another memory layout, which bear its name, do not count.
    """
    layers = [layer for layer in layers if not layer.name.startswith("Reformatting CopyNode")]

    def runs_in_int8(node: str) -> bool:
        holders = [
            layer
            for layer in layers
            if re.search(rf"(?<![\w/.]){re.escape(node)}(?![\w/.])", layer.name)
        ]
        return bool(holders) and all(layer.precision == "INT8" for layer in holders)

    return [node for node in nodes if not runs_in_int8(node)]


class _CudaGraph:
    """What `enqueue` puts on a stream, recorded once and launched as a whole; PyCUDA has no binding for it."""

    def __init__(self, stream: Any, enqueue: Callable[[], None]):
        self._cuda, self._stream = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(stream.handle)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(
            self._cuda.cuStreamBeginCapture_v2(self._stream, 1)
        )  # 1: of this thread's work only
        enqueue()
        self._check(self._cuda.cuStreamEndCapture(self._stream, ctypes.byref(graph)))
        self._check(
            self._cuda.cuGraphInstantiateWithFlags(
                ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0)
            )
        )

    def __call__(self) -> None:
        self._check(self._cuda.cuGraphLaunch(self._executable, self._stream))

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"CUDA graph: error {status}")


class _Slot:
    """One batch's buffers, pinned on the host and on the device, and the engine bound to them as a CUDA graph."""

    def __init__(
        self, cuda: ModuleType, context: Any, stream: Any, shapes: dict[str, tuple[int, ...]]
    ):
        self._context, self._stream = context, stream
        self.images = cuda.pagelocked_empty(shapes[INPUT], np.uint8)
        self.logits = cuda.pagelocked_empty(shapes[OUTPUT], np.float32)
        self.device_images, self.device_logits = (
            cuda.mem_alloc(self.images.nbytes),
            cuda.mem_alloc(self.logits.nbytes),
        )
        self.copied, self.done = (cuda.Event(cuda.event_flags.DISABLE_TIMING) for _ in range(2))

        self.enqueue()  # the first run allocates what a recording must not
        stream.synchronize()
        self.launch = _CudaGraph(stream, self.enqueue)

    def enqueue(self) -> None:
        """Run the engine without the graph."""
        self._context.set_tensor_address(INPUT, int(self.device_images))
        self._context.set_tensor_address(OUTPUT, int(self.device_logits))
        if not self._context.execute_async_v3(self._stream.handle):
            raise UserError("TensorRT could not run the engine; delete it and build it again")


class _Lane:
    """An execution context for one batch size. Two slots take turns, so that copies overlap with compute."""

    def __init__(
        self, trt: ModuleType, cuda: ModuleType, engine: Any, profile: int, batch_size: int
    ):
        self.cuda, self.batch_size = cuda, batch_size
        self.copies, self.compute = cuda.Stream(), cuda.Stream()
        if hasattr(
            trt, "DynamicShapesKernelSpecializationStrategy"
        ):  # or RTX starts with slow kernels, and a graph keeps them
            config = engine.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            self.context = engine.create_execution_context(config)
        else:
            self.context = engine.create_execution_context()
        if self.context is None:
            raise UserError(TOO_LITTLE_MEMORY)
        self.context.set_optimization_profile_async(profile, self.compute.handle)
        self.context.set_input_shape(
            INPUT, (batch_size, *tuple(engine.get_tensor_shape(INPUT))[1:])
        )
        shapes = {name: tuple(self.context.get_tensor_shape(name)) for name in (INPUT, OUTPUT)}
        try:
            self.slots = [_Slot(cuda, self.context, self.compute, shapes) for _ in range(2)]
        except cuda.MemoryError:
            raise UserError(TOO_LITTLE_MEMORY) from None

    def start(self, slot: _Slot, images: np.ndarray) -> None:
        """Enqueue the copy in, the engine and the copy out of a batch of at most `batch_size` images."""
        slot.images[: len(images)] = images
        self.cuda.memcpy_htod_async(slot.device_images, slot.images, self.copies)
        slot.copied.record(self.copies)
        self.compute.wait_for_event(slot.copied)
        slot.launch()
        self.cuda.memcpy_dtoh_async(slot.logits, slot.device_logits, self.compute)
        slot.done.record(self.compute)

    def burst_ms(self) -> list[float]:
        """Device times of single engine runs in ms, from events between launches that follow each other at once."""
        events = [self.cuda.Event() for _ in range(BURST + 1)]
        self.slots[0].launch()  # or the first time would have the host's next launch in it
        for event in events[:-1]:
            event.record(self.compute)
            self.slots[0].launch()
        events[-1].record(self.compute)
        events[-1].synchronize()
        return [start.time_till(end) for start, end in zip(events, events[1:], strict=False)]


class TensorRTNetwork(Network):
    """An exported graph as a TensorRT engine: images (N, H, W, 3) uint8 -> logits (N, classes) float32.

    Raises:
        UserError: no TensorRT, driver or fitting GPU; the graph or the build fails; too little memory.
    """

    name = "tensorrt"

    def __init__(
        self,
        folder: Path,
        options: EngineOptions,
        calibration: np.ndarray,
        timings: Path | None = None,
    ):
        self._trt, self._cuda = trt, cuda = require_gpu()
        self._log = make_logger(trt)
        path = folder / graph_name(trt, options)
        plan, self.path = cached_plan(
            trt, cuda, path, options, folder / "engines", calibration, timings
        )
        self._engine = trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(
                f"{self.path} cannot be loaded: {self._log.errors[-1]}; delete it to have it built again"
            )
        self._sizes, self._lanes = options.batch_sizes, {}
        self._profiles = [self._inspect(profile) for profile in range(len(self._sizes))]
        self.layers = self._profiles[-1]

    def _inspect(self, profile: int) -> list[Layer]:
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._lane(
            self._sizes[profile]
        ).context  # types are told only for a known batch size
        # one by one: asked for all layers of a deep engine at once, 8.6 answers with an empty string
        form = self._trt.LayerInformationFormat.JSON
        told = [
            inspector.get_layer_information(index, form) for index in range(self._engine.num_layers)
        ]
        return profile_layers(list(map(parse_layer, told)), profile)

    def float_nodes(self, nodes: Iterable[str]) -> list[str]:
        """Which of the graph's `nodes`, all meant to run in INT8, do not, whatever the batch size."""
        return [
            node for node in nodes if any(float_nodes(layers, [node]) for layers in self._profiles)
        ]

    def layer_times_ms(self) -> list[float | None]:
        """The median device time of each of `layers`, None if TensorRT's profiler does not name it.

        Timed one by one at the largest batch size, they take longer together than the engine, whose layers follow each other
        at once.
        """
        lane, times = self._lane(self._sizes[-1]), defaultdict(list)

        class Profiler(self._trt.IProfiler):
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times[printable(layer_name)].append(ms)

        lane.context.profiler = Profiler()
        for _ in range(BURST):
            lane.slots[
                0
            ].enqueue()  # a graph recorded before there was a profiler would tell it nothing
            lane.compute.synchronize()
        own = [
            max(
                (name for name in times if f"{x.name} ".startswith(f"{name} ")),
                key=len,
                default=None,
            )
            for x in self.layers
        ]
        return [statistics.median(times[name]) if name else None for name in own]

    def _lane(self, batch_size: int) -> _Lane:
        if batch_size not in self._lanes:
            profile = next((i for i, size in enumerate(self._sizes) if size >= batch_size), None)
            if profile is None:
                raise UserError(
                    f"the engine was built for batches of at most {self._sizes[-1]}, not {batch_size}"
                )
            self._lanes[batch_size] = _Lane(
                self._trt, self._cuda, self._engine, profile, batch_size
            )
        return self._lanes[batch_size]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return next(self.stream([images]))

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits of each batch, in order, while the next is on its way; no batch may be larger than the first."""
        lane, running = None, deque()
        for index, images in enumerate(batches):
            lane = lane or self._lane(len(images))
            if len(running) == len(lane.slots):
                yield self._finish(*running.popleft())
            slot = lane.slots[index % 2]
            lane.start(slot, images)
            running.append((slot, len(images)))
        while running:
            yield self._finish(*running.popleft())

    @staticmethod
    def _finish(slot: _Slot, count: int) -> np.ndarray:
        slot.done.synchronize()
        return slot.logits[:count].copy()

    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """Times of the engine alone, on the device, copies excluded."""
        self(images)  # leaves them in the lane's first buffers
        return repeated_ms(self._lane(len(images)).burst_ms)
