"""TensorRT engines as networks: buffers, CUDA graphs, streams and device times. Imports no torch.

A batch takes three steps: its images are copied in, the engine runs, its logits are copied out.
Each batch size has an execution context with two streams and two sets of buffers, which batches
use in turn, so that the copy of one overlaps with the run of the one before:

    copies    in 0   in 1          in 2          in 3
    compute          run 0  out 0  run 1  out 1  run 2  out 2

Events order them. `copied` lets the run wait for its images. `done` lets the host wait for the
logits: batch 2 may overwrite what batch 0 used once the host has its result.
"""

from __future__ import annotations

import ctypes
import math
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from utils.backends.network import BURST, Network, repeated_ms
from utils.backends.tensorrt_build import EngineOptions, cached_plan, make_logger, require_gpu
from utils.backends.tensorrt_layers import median_ms, printable, read_layers, runs_in_int8
from utils.errors import UserError
from utils.manifest import INPUT, OUTPUT

TOO_LITTLE_MEMORY = "the GPU has too little memory for this engine: use a smaller --batch_size"

CAPTURE_MODE_THREAD_LOCAL = 1
"""CUDA's CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: while a stream is recorded, calls that do not go
with it, such as an allocation, are errors in this thread but not in others (torch's, tqdm's)."""


def cuda_graph(stream: Any, enqueue: Callable[[], None]) -> Callable[[], None]:
    """Record what `enqueue` puts on a stream; the result launches it as a whole.

    One launch takes the host a few microseconds, where enqueuing an engine takes some for each
    kernel. PyCUDA has no binding for it, so this calls the driver.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    handle, graph, executable = (ctypes.c_void_p(value) for value in (stream.handle, None, None))

    def call(function: str, *arguments: Any) -> None:
        status = getattr(driver, function)(*arguments)
        if status != 0:
            raise RuntimeError(f"{function} failed: CUDA error {status}")

    # between these two calls the stream runs nothing: what is enqueued becomes nodes of a graph
    call("cuStreamBeginCapture_v2", handle, CAPTURE_MODE_THREAD_LOCAL)
    enqueue()
    call("cuStreamEndCapture", handle, ctypes.byref(graph))

    # the graph, made ready to launch, is needed no more; there are no flags
    no_flags = ctypes.c_ulonglong(0)
    call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, no_flags)
    call("cuGraphDestroy", graph)
    return lambda: call("cuGraphLaunch", executable, handle)


class _Buffers:
    """Memory of one batch, on the host and the device, and an engine bound to it as a CUDA graph.

    Args:
        context: a TensorRT execution context that knows its batch size.
        stream: where the engine runs.
    """

    def __init__(self, cuda: ModuleType, context: Any, stream: Any):
        self._context = context
        self._stream = stream
        # an engine that reads (N, 3, H, W) in the format HWC takes the bytes of (N, H, W, 3)
        batch_size, *image_shape = context.get_tensor_shape(INPUT)
        # pinned host memory: copies from and to it run beside the host's own work
        self.images = cuda.pagelocked_empty((batch_size, math.prod(image_shape)), np.uint8)
        self.logits = cuda.pagelocked_empty(tuple(context.get_tensor_shape(OUTPUT)), np.float32)
        self.device_images = cuda.mem_alloc(self.images.nbytes)
        self.device_logits = cuda.mem_alloc(self.logits.nbytes)
        self.copied = cuda.Event(cuda.event_flags.DISABLE_TIMING)
        self.done = cuda.Event(cuda.event_flags.DISABLE_TIMING)

        # the first run of a context allocates memory and loads kernels, which no recording can
        self.enqueue()
        stream.synchronize()
        self.launch = cuda_graph(stream, self.enqueue)

    def enqueue(self) -> None:
        """Run the engine on these buffers without the CUDA graph."""
        self._context.set_tensor_address(INPUT, int(self.device_images))
        self._context.set_tensor_address(OUTPUT, int(self.device_logits))
        if not self._context.execute_async_v3(self._stream.handle):
            raise UserError("TensorRT could not run the engine; delete it and build it again")


def _create_context(trt: ModuleType, engine: Any) -> Any:
    settings = []
    if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        # RTX starts with slow kernels for any shape and compiles faster ones meanwhile; a CUDA
        # graph would keep the slow ones, so it must compile at once
        config = engine.create_runtime_config()
        strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.dynamic_shapes_kernel_specialization_strategy = strategy
        settings.append(config)
    context = engine.create_execution_context(*settings)
    # TensorRT raises nothing
    if context is None:
        raise UserError(TOO_LITTLE_MEMORY)
    return context


class _BatchContext:
    """An execution context for one batch size, with two sets of buffers that take turns.

    Raises:
        UserError: the GPU has too little memory.
    """

    def __init__(
        self, trt: ModuleType, cuda: ModuleType, engine: Any, profile: int, batch_size: int
    ):
        self._cuda = cuda
        self._copies, self.compute = cuda.Stream(), cuda.Stream()
        self.context = _create_context(trt, engine)
        # shapes are fixed before anything is recorded: a CUDA graph holds them
        self.context.set_optimization_profile_async(profile, self.compute.handle)
        image_shape = tuple(engine.get_tensor_shape(INPUT))[1:]
        self.context.set_input_shape(INPUT, (batch_size, *image_shape))
        try:
            self.buffers = [_Buffers(cuda, self.context, self.compute) for _ in range(2)]
        except cuda.MemoryError:
            raise UserError(TOO_LITTLE_MEMORY) from None

    def start(self, buffers: _Buffers, images: np.ndarray) -> None:
        """Enqueue a batch of at most this context's size: copy in, run, copy out."""
        buffers.images[: len(images)] = images.reshape(len(images), -1)
        self._cuda.memcpy_htod_async(buffers.device_images, buffers.images, self._copies)
        # the engine waits for the images, on the device: the host goes on
        buffers.copied.record(self._copies)
        self.compute.wait_for_event(buffers.copied)
        buffers.launch()
        self._cuda.memcpy_dtoh_async(buffers.logits, buffers.device_logits, self.compute)
        buffers.done.record(self.compute)

    def burst_ms(self) -> list[float]:
        """Device times of single runs, from events between launches that follow each other."""
        launch = self.buffers[0].launch
        events = [self._cuda.Event() for _ in range(BURST + 1)]
        # a run ahead, during which the host enqueues the next: else the first time would hold the
        # host's own
        launch()
        for event in events[:-1]:
            event.record(self.compute)
            launch()
        events[-1].record(self.compute)
        events[-1].synchronize()
        pairs = zip(events[:-1], events[1:], strict=True)
        return [start.time_till(end) for start, end in pairs]


class TensorRTNetwork(Network):
    """An exported graph as a TensorRT engine.

    Args:
        folder: of the export.
        calibration, timings, engines: see `cached_plan`.

    Raises:
        UserError: no TensorRT, driver or fitting GPU; the graph or the build fails; too little
            memory.
    """

    name = "tensorrt"
    device_time = True

    def __init__(
        self,
        folder: Path,
        options: EngineOptions,
        calibration: np.ndarray,
        timings: Path | None = None,
        engines: Path | None = None,
    ):
        self._trt, self._cuda = require_gpu()
        plan, self.path = cached_plan(
            self._trt, self._cuda, folder, options, calibration, timings, engines
        )
        # the engine goes on using the logger: it must live as long
        self._log = make_logger(self._trt)
        self._engine = self._trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(
                f"{self.path} cannot be loaded: {self._log.last_error}; "
                "delete it to have it built again"
            )
        self._batch_sizes = options.batch_sizes
        self._contexts: dict[int, _BatchContext] = {}
        self.evaluation_batch = self._batch_sizes[-1]
        # each profile has layers and types of its own; those of the largest batch size are shown
        self._profiles = []
        for profile, batch_size in enumerate(self._batch_sizes):
            context = self._context_for(batch_size).context
            self._profiles.append(read_layers(self._trt, self._engine, context, profile))
        self.layers = self._profiles[-1]

    def _context_for(self, batch_size: int) -> _BatchContext:
        """The context of a batch size, made when it is first asked for."""
        if batch_size > self.evaluation_batch:
            most = f"batches of at most {self.evaluation_batch}"
            raise UserError(f"the engine was built for {most}, not {batch_size}")
        if batch_size not in self._contexts:
            # the smallest that holds it
            profile = bisect_left(self._batch_sizes, batch_size)
            self._contexts[batch_size] = _BatchContext(
                self._trt, self._cuda, self._engine, profile, batch_size
            )
        return self._contexts[batch_size]

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return next(self.stream([images]))

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Logits of each batch, in order, while the next one is on its way.

        Batches run in the context of the largest before them, those that are smaller with a rest
        of older images behind them.
        """
        size = 0
        in_flight: deque[tuple[_Buffers, int]] = deque()
        for index, images in enumerate(batches):
            size = max(size, len(images))
            context = self._context_for(size)
            # both sets of buffers are taken: the older batch must end before this one can start
            if len(in_flight) == 2:
                yield self._finish(*in_flight.popleft())
            buffers = context.buffers[index % 2]
            context.start(buffers, images)
            in_flight.append((buffers, len(images)))
        while in_flight:
            yield self._finish(*in_flight.popleft())

    @staticmethod
    def _finish(buffers: _Buffers, count: int) -> np.ndarray:
        """The logits (count, classes) of a batch, once they are there."""
        buffers.done.synchronize()
        # a copy: the buffers are about to be used again
        return buffers.logits[:count].copy()

    def latencies_ms(self, images: np.ndarray) -> np.ndarray:
        """Times of the engine alone, on the device, without copies."""
        # leaves the images in the context's first buffers, which the bursts read
        self(images)
        return repeated_ms(self._context_for(len(images)).burst_ms)

    def layer_times_ms(self) -> list[float | None]:
        """The median device time of each of `layers`, None where the profiler does not name it.

        Layers are timed one by one at the largest batch size. Together they take longer than the
        engine, whose layers follow each other at once.
        """
        batch = self._context_for(self.evaluation_batch)
        times_ms = defaultdict(list)

        class Profiler(self._trt.IProfiler):
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                times_ms[printable(layer_name)].append(ms)

        batch.context.profiler = Profiler()
        for _ in range(BURST):
            # not the CUDA graph: recorded before there was a profiler, it would tell it nothing
            batch.buffers[0].enqueue()
            batch.compute.synchronize()
        return [median_ms(layer, times_ms) for layer in self.layers]

    def float_nodes(self, nodes: Iterable[str]) -> list[str]:
        """Those of the graph's `nodes` that some batch size does not run in INT8."""

        def runs_in_all(node: str) -> bool:
            return all(runs_in_int8(layers, node) for layers in self._profiles)

        return [node for node in nodes if not runs_in_all(node)]
