r"""Record the Python API of the TensorRT that is installed, as the JSON files beside this script.

    python tests/tensorrt_api/record.py MODULE ["how it was recorded"] > FILE

MODULE is tensorrt, tensorrt_bindings or tensorrt_rtx_bindings. No GPU is needed. PyPI has the
bindings of 10.x and 11.x without the libraries that they are linked against:

    pip download --no-deps --only-binary=:all: tensorrt-cu12-bindings==11.4.0.106

As nothing is called, stubs satisfy the loader. Make them in an empty folder, and record with
LD_LIBRARY_PATH set to it (.so.10 for 10.x):

    nm -D --undefined-only .../tensorrt_bindings/tensorrt.so |
        sed -nE 's/.* U ((create|get|init)[A-Z][A-Za-z_]*)$/void *\1(void) { return 0; }/p' \
        > stubs.c
    for name in nvinfer nvinfer_plugin nvonnxparser; do
        gcc -shared -fPIC stubs.c -o lib$name.so.11
    done
"""

import importlib
import json
import platform
import sys

CLASSES = """Builder IBuilderConfig INetworkDefinition OnnxParser ParserError ICudaEngine
    IExecutionContext Runtime EngineInspector IOptimizationProfile ITimingCache IHostMemory ILogger
    Logger IInt8EntropyCalibrator2 IInt8Calibrator ILayer ITensor IProgressMonitor IRuntimeConfig"""
ENUMS = """NetworkDefinitionCreationFlag BuilderFlag OnnxParserFlag LayerInformationFormat
    MemoryPoolType TacticSource ProfilingVerbosity DataType TensorIOMode LayerType ComputeCapability
    HardwareCompatibilityLevel RuntimePlatform QuantizationFlag PreviewFeature
    DynamicShapesKernelSpecializationStrategy TensorFormat TilingOptimizationLevel"""


def public(thing: object) -> list[str]:
    return sorted(name for name in dir(thing) if not name.startswith("_"))


def record(module_name: str, source: str | None = None) -> dict:
    module = importlib.import_module(module_name)
    if source is None:
        python = platform.python_version()
        source = f"dir() of {module_name} under Python {python} on {platform.system()}"
    classes = {}
    for name in CLASSES.split():
        if hasattr(module, name):
            classes[name] = public(getattr(module, name))
    enums = {}
    for name in ENUMS.split():
        if hasattr(module, name):
            members = getattr(module, name).__members__
            enums[name] = {key: int(member.value) for key, member in members.items()}
    return {
        "version": module.__version__,
        "source": source,
        "module": public(module),
        "classes": classes,
        "enums": enums,
    }


if __name__ == "__main__":
    print(json.dumps(record(*sys.argv[1:]), indent=1))
