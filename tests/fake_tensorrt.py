"""TensorRT and PyCUDA that need no GPU: what a recording lacks, a fake lacks too.

Recordings are in `tensorrt_api`. An attribute that was not recorded raises AttributeError, when
read and when written. So code that works with the fake asks the real version for nothing it does
not have. One that is recorded but not faked raises NotImplementedError: `hasattr` never gets a
wrong answer. Names that start with an underscore are for tests.
"""

from __future__ import annotations

import enum
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

RECORDINGS = Path(__file__).parent / "tensorrt_api"
GENERATIONS = ("8.6", "10", "10.16", "11", "rtx")
IMAGE, CLASSES = (4, 4, 3), 3


class Recorded:
    """An object with the recorded attributes, and no others."""

    _recorded: frozenset[str]
    _trt: ModuleType

    def __getattr__(self, name):
        if name in type(self)._recorded:
            raise NotImplementedError(f"{type(self).__name__}.{name} is not faked")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name, value):
        if name[0] != "_" and name not in type(self)._recorded:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)


class RecordedEnum(enum.Enum):
    def __int__(self):
        return self.value


class BaseOfPython:
    """What Python classes derive from: a logger, a calibrator, a profiler.

    The real ones insist on a call of __init__.
    """

    def __init__(self):
        self._initialised = True


class Builder:
    def __init__(self, log):
        assert log._initialised
        self._log = log
        if self._trt._fails == "start":
            log.log(self._trt.ILogger.ERROR, "CUDA initialization failure\nwith error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    def create_network(self, flags=0):
        network = self._trt.INetworkDefinition()
        network._creation_flags = flags
        return network

    def create_builder_config(self):
        return self._trt.IBuilderConfig()

    def create_optimization_profile(self):
        return self._trt.IOptimizationProfile()

    def build_serialized_network(self, network, config):
        self._trt._built.append((network, config))
        for severity, text in (
            ("ERROR", "an older error"),
            ("ERROR", "no tactic\nfor /conv1/Conv"),
            ("WARNING", "slow"),
        ):
            self._log.log(getattr(self._trt.ILogger, severity), text)
        if self._trt._fails == "build":
            return None
        if getattr(config, "_calibrator", None):
            self._calibrate(config._calibrator, network.get_input(0).name)
        config._timing._content += b"timed "
        return b"plan %d of " % len(self._trt._built) + network._graph

    @staticmethod
    def _calibrate(calibrator, name):
        assert calibrator._initialised
        if calibrator.read_calibration_cache() is None:
            while calibrator.get_batch([name]) is not None:
                pass
            calibrator.write_calibration_cache(memoryview(b"ranges"))


class INetworkDefinition:
    def get_input(self, index):
        return self._inputs[index]

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_layer(self, index):
        return self._layers[index]

    @property
    def num_layers(self):
        return len(self._layers)


class ILayer:
    def __init__(self, kind, inputs, output):
        self._inputs, self._output, self._type = inputs, output, self._trt.LayerType[kind]

    @property
    def type(self):
        return self._type

    @property
    def num_inputs(self):
        return len(self._inputs)

    def get_input(self, index):
        return self._inputs[index]

    def set_input(self, index, tensor):
        self._inputs[index] = tensor

    def get_output(self, index):
        return [self._output][index]


class OnnxParser:
    def __init__(self, network, log):
        self._network, self._failed = network, self._trt._fails == "parse"

    def parse(self, graph):
        images, cast, transposed, scale, scaled = map(
            self._tensor, ("images", "cast", "transposed", "scale", "scaled")
        )
        images.shape = (-1, *IMAGE)
        self._network._graph, self._network._inputs = graph, [images] if graph else []
        self._network._layers = [
            self._trt.ILayer("CAST", [images], cast),
            self._trt.ILayer("SHUFFLE", [cast, None], transposed),
            self._trt.ILayer("SHUFFLE", [scale], scale),
            self._trt.ILayer("ELEMENTWISE", [transposed, scale], scaled),
        ]
        return not self._failed

    def _tensor(self, name):
        tensor = self._trt.ITensor()
        tensor.name = name
        return tensor

    @property
    def num_errors(self):
        return 2 if self._failed else 0

    def get_error(self, index):
        error = self._trt.ParserError()
        error._index = index
        return error


class ParserError:
    def __str__(self):
        return ("In node 0 (odd):\nNo importer for Nonsense", "Failed to parse")[self._index]


class IBuilderConfig:
    def __init__(self):
        self._flags, self._pools, self._profiles, self._features = set(), {}, [], {}

    def set_memory_pool_limit(self, pool, size):
        self._pools[pool.name] = size

    def set_tactic_sources(self, bits):
        self._tactic_sources = bits

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def set_preview_feature(self, feature, on):
        self._features[feature.name] = on

    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    @property
    def int8_calibrator(self):
        return self._calibrator

    @int8_calibrator.setter
    def int8_calibrator(self, calibrator):
        self._calibrator = calibrator

    def set_calibration_profile(self, profile):
        self._calibration_profile = profile._shapes

    def create_timing_cache(self, content):
        assert isinstance(content, bytes)
        cache = self._trt.ITimingCache()
        cache._content = content
        return cache

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        self._timing, self._timing_before = cache, cache._content

    def get_timing_cache(self):
        return self._timing


class IOptimizationProfile:
    def __init__(self):
        self._shapes = {}

    def set_shape(self, name, least, best, most):
        self._shapes[name] = (least, best, most)


class ITimingCache:
    def serialize(self):
        return memoryview(self._content)


class Runtime:
    def __init__(self, log):
        self._log = log

    def deserialize_cuda_engine(self, plan):
        if self._trt._fails == "load":
            self._log.log(self._trt.ILogger.ERROR, "Version tag does not match")
            return None
        return self._trt.ICudaEngine()


class ICudaEngine:
    @property
    def num_layers(self):
        return len(self._trt._inspect(None))

    def create_engine_inspector(self):
        return self._trt.EngineInspector()

    def create_runtime_config(self):
        return self._trt.IRuntimeConfig()

    def create_execution_context(self, config=None):
        if self._trt._fails == "context":
            return None
        context = self._trt.IExecutionContext()
        context._config = config
        return context

    def get_tensor_shape(self, name):
        # in the format HWC
        return (-1, IMAGE[2], *IMAGE[:2]) if name == "images" else (-1, CLASSES)


class EngineInspector:
    execution_context = None

    def get_layer_information(self, index, form):
        assert form is self._trt.LayerInformationFormat.JSON
        return self._trt._inspect(self.execution_context and self.execution_context._profile)[index]


class IExecutionContext:
    """Runs `logits_of` on what the images' address holds."""

    _profiler, _runs = None, 0

    @property
    def profiler(self):
        return self._profiler

    @profiler.setter
    def profiler(self, profiler):
        assert profiler._initialised
        self._profiler = profiler

    def set_optimization_profile_async(self, profile, handle):
        self._profile, self._addresses = profile, {}
        return True

    def set_input_shape(self, name, shape):
        assert name == "images"
        self._shape = shape
        return True

    def get_tensor_shape(self, name):
        return self._shape if name == "images" else (self._shape[0], CLASSES)

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, handle):
        if self._trt._fails == "run":
            return False
        cuda, source, target = self._trt._cuda, self._addresses["images"], self._addresses["logits"]
        profiler = self._profiler  # a graph that was recorded before there was one reports nothing
        self._runs += 1

        def run():
            images = cuda.memory[source].reshape(self._shape)
            cuda.memory[target][:] = logits_of(images).view(np.uint8).ravel()
            for index, name in enumerate(self._trt._profiled(self._profile) if profiler else ()):
                profiler.report_layer_time(name, index + 0.5 if self._runs > 5 else 100.0)

        cuda.streams[handle].enqueue("run", run)
        return True


BEHAVIOURS = (
    Builder,
    INetworkDefinition,
    ILayer,
    OnnxParser,
    ParserError,
    IBuilderConfig,
    IOptimizationProfile,
    ITimingCache,
    Runtime,
    ICudaEngine,
    EngineInspector,
    IExecutionContext,
)


def logits_of(images):
    """What the fake engine computes: (N, H, W, 3) uint8 -> (N, CLASSES) float32.

    Different images have different logits.
    """
    flat = images.reshape(len(images), -1).astype(np.float32)
    return np.ascontiguousarray(np.stack([flat.sum(1), flat[:, 0], flat[:, -1]], 1))


def fake_tensorrt(generation):
    """A module with what was recorded of that generation.

    For tests it also has

    - `_fails`: which step fails,
    - `_built`: networks and configurations of all builds,
    - `_cuda`: where engines run,
    - `_inspect`: what the inspector says of an optimization profile,
    - `_profiled`: names that a profiler hears.
    """
    recording = json.loads((RECORDINGS / f"{generation}.json").read_text())
    module = ModuleType("tensorrt_rtx_bindings" if generation == "rtx" else "tensorrt")
    behaviours = {behaviour.__name__: vars(behaviour) for behaviour in BEHAVIOURS}
    for name, attributes in recording["classes"].items():
        if name in ("ILogger", "IInt8EntropyCalibrator2"):
            made = type(name, (BaseOfPython,), {key: key for key in attributes if key.isupper()})
        else:
            known = {"__init__", "__str__", *attributes}
            behaviour = {
                k: v
                for k, v in behaviours.get(name, {}).items()
                if k in known or re.match("_[a-z]", k)
            }
            made = type(
                name, (Recorded,), {**behaviour, "_recorded": frozenset(attributes), "_trt": module}
            )
        setattr(module, name, made)
    module.IProfiler = type("IProfiler", (BaseOfPython,), {})
    for name, members in recording["enums"].items():
        setattr(module, name, RecordedEnum(name, members))

    def missing(name):
        kind = NotImplementedError if name in recording["module"] else AttributeError
        raise kind(f"module {module.__name__!r} {recording['version']} has no attribute {name!r}")

    module.__getattr__, module.__version__ = missing, recording["version"]
    module._fails, module._built, module._cuda = None, [], None
    module._inspect = module._profiled = lambda profile: []
    return module


class FakeStream:
    """Work runs as late as may be, when somebody waits for it; if the stream is eager, at once."""

    def __init__(self, cuda):
        self.cuda, self.handle = cuda, len(cuda.streams)
        self.eager = self.handle % 2 in cuda.eager
        self.queue, self.captured = [], None
        cuda.streams.append(self)

    def enqueue(self, name, work):
        if self.captured is not None:
            self.captured.append((name, work))
            return
        self.cuda.calls.append(name)
        self.queue.append(work)
        if self.eager:
            self.synchronize()

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()

    def wait_for_event(self, event):
        self.enqueue("wait", event.marker)


class FakeEvent:
    def __init__(self, cuda, flags=0):
        self.cuda, self.timed = cuda, flags == 0

    def record(self, stream):
        state = []

        def marker():  # called by whoever waits, and by the stream itself when it gets there
            while not state and stream.queue:
                stream.queue.pop(0)()

        self.marker, self.time = marker, len(self.cuda.calls)
        stream.enqueue("record", lambda: state.append("reached"))

    def synchronize(self):
        self.marker()

    def time_till(self, later):
        assert self.timed
        return 0.5 * (later.time - self.time)


class FakeMemory:
    def __init__(self, cuda, size):
        self.address, self.content = 256 * (len(cuda.memory) + 1), np.zeros(size, np.uint8)
        cuda.memory[self.address] = self.content

    def __int__(self):
        return self.address


class FakeGraph:
    """In place of `utils.backends.tensorrt_run.cuda_graph`."""

    def __init__(self, stream, enqueue):
        self.stream, stream.captured = stream, []
        enqueue()
        self.work, stream.captured = stream.captured, None

    def __call__(self):
        for name, work in self.work:
            self.stream.enqueue(name, work)


class FakeCuda:
    """`pycuda.driver`.

    Of each two streams the first is for copies, the second for compute. The first is eager if
    `eager` has a 0, the second if it has a 1.
    """

    class MemoryError(Exception):
        pass

    event_flags = SimpleNamespace(DISABLE_TIMING=2)

    def __init__(self, name="Some GPU", capability=(8, 6), eager=()):
        self.eager, self.calls, self.streams, self.memory, self.free = eager, [], [], {}, 10**9
        device = SimpleNamespace(name=lambda: name, compute_capability=lambda: capability)
        self.Context = SimpleNamespace(get_device=lambda: device)

    def Stream(self):
        return FakeStream(self)

    def Event(self, flags=0):
        return FakeEvent(self, flags)

    def mem_alloc(self, size):
        assert all(stream.captured is None for stream in self.streams), (
            "memory allocated while a CUDA graph is recorded"
        )
        self.free -= size
        if self.free < 0:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return FakeMemory(self, size)

    @staticmethod
    def pagelocked_empty(shape, dtype):
        return np.full(shape, 77, dtype)

    @staticmethod
    def memcpy_htod(target, source):
        target.content[: source.nbytes] = source.view(np.uint8).ravel()

    def memcpy_htod_async(self, target, source, stream):
        stream.enqueue("in", lambda: self.memcpy_htod(target, source))

    @staticmethod
    def memcpy_dtoh_async(target, source, stream):
        stream.enqueue(
            "out", lambda: target.view(np.uint8).ravel().__setitem__(slice(None), source.content)
        )
