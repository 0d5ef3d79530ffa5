r"""What a TensorRT engine runs, layer by layer: the audit of what is in INT8. Imports no torch.

TensorRT fuses nodes of the ONNX graph into layers, and the audit finds a node again by its name.
Of a node `/conv1/Conv` with a ReLU behind it, in the engine's second profile:

    inspector's name      /conv1/Conv + /relu/Relu [profile 1]                    8.6
                          __myl_ConvRelu_myl0_3                                   10 and later
    inspector's metadata  [ONNX Layer: /conv1/Conv]\x1e[ONNX Layer: /relu/Relu]   both
    profiler's name       the inspector's

`Layer.name` is the inspector's name and its metadata, joined by a space. So

- a layer holds a node if its name has the node's in it, as a whole: `/conv1/Conv` is a part of
  `/layer1/conv1/Conv` and of `/conv1/Conv_1`, but neither of them is it;
- a layer's time is that of the longest of the profiler's names that begins the layer's and ends
  where one of its words does.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from utils.records import Layer

SILENT = Layer("(TensorRT tells nothing of this layer)", "-", "-", "-")


def read_layers(trt: ModuleType, engine: Any, context: Any, profile: int) -> list[Layer]:
    """Layers that an optimization profile of an engine runs.

    Args:
        context: an execution context of that profile. Types are told only for a known batch size.
    """
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    form = trt.LayerInformationFormat.JSON
    layers = []
    # one by one: asked for all layers of a deep engine at once, 8.6 answers with an empty string
    for index in range(engine.num_layers):
        text = inspector.get_layer_information(index, form)
        layers.append(parse_layer(text))
    return profile_layers(layers, profile)


def profile_layers(layers: Sequence[Layer], profile: int) -> list[Layer]:
    """Those of an engine's `layers` that an optimization profile runs.

    Where each profile has layers of its own, they are marked, all but the first profile's.
    """
    marked = [layer for layer in layers if f"[profile {profile}]" in layer.name]
    return marked or [layer for layer in layers if "[profile " not in layer.name]


def parse_layer(text: str | None) -> Layer:
    """A layer from the inspector's JSON; `SILENT` if that is empty or cut off."""
    try:
        # 8.6 leaves control characters in its strings
        content = json.loads(text or "", strict=False)
    except ValueError:
        return SILENT
    return Layer(
        name=printable(f"{content['Name']} {content.get('Metadata', '')}"),
        kind=content.get("ParameterType") or content.get("LayerType", "-"),
        precision=_precision(content),
        tactic=content.get("TacticName") or content.get("TacticValue") or "-",
    )


def _precision(content: Mapping[str, Any]) -> str:
    """The type of a layer's first input or, where that is not told, of its weights.

    The inspector hides it in prose, under keys that differ by version:

        8.6 and 10   "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"
        11           "Datatype": "Int8", "Format": "Row major linear"
        weights      "Type": "Int8"
    """
    words = []
    for tensor in (*content.get("Inputs", [])[:1], content.get("Weights") or {}):
        words += [value.lower() for key, value in tensor.items() if "type" in key.lower()]
    found = re.search(r"uint8|int8|fp16|half|fp32|float|int32|bool", " ".join(words))
    if found is None:
        return "-"
    standard = {"half": "fp16", "float": "fp32"}
    return standard.get(found[0], found[0]).upper()


def printable(name: str) -> str:
    """A name without the control characters that TensorRT joins its parts with."""
    return re.sub(r"[\x00-\x1f]+", " ", name).strip()


def runs_in_int8(layers: Sequence[Layer], node: str) -> bool:
    """Whether the graph's `node` is in an engine's layers, and all that hold it run in INT8.

    Copies into another memory layout do not count. They bear the name of the layer they are for:
    "Reformatting CopyNode for Input Tensor 0 to /conv1/Conv".
    """
    # no letter, digit, slash or dot beside it, or it would be a part of another name
    whole_name = re.compile(rf"(?<![\w/.]){re.escape(node)}(?![\w/.])")
    precisions = set()
    for layer in layers:
        is_copy = layer.name.startswith("Reformatting CopyNode")
        if not is_copy and whole_name.search(layer.name):
            precisions.add(layer.precision)
    return precisions == {"INT8"}


def median_ms(layer: Layer, times_ms: Mapping[str, Sequence[float]]) -> float | None:
    """The median of a layer's times; None if the profiler does not name it.

    Args:
        times_ms: what the profiler measured, by its own names, made `printable`.
    """
    names = [name for name in times_ms if f"{layer.name} ".startswith(f"{name} ")]
    if not names:
        return None
    return statistics.median(times_ms[max(names, key=len)])
