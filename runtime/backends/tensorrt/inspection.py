"""What an engine is made of, as TensorRT's inspector tells it.

The builder keeps layers in detail (`zreward.export.tensorrt.builder`), or an inspector would have names alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from zreward.errors import BackendError
from zreward.runtime.backends.tensorrt.context import LoadedEngine


@dataclass(frozen=True)
class EngineLayer:
    """One layer.

    Attributes:
        name: as the builder gave it.
        kind: such as "gemm" or "PluginV3"; empty where the engine keeps names alone.
        plugin: name of the operator that a plugin computes; None for other layers.
    """

    name: str
    kind: str = ""
    plugin: str | None = None


def layers_of(engine: LoadedEngine) -> tuple[EngineLayer, ...]:
    """The layers of an engine.

    Raises:
        BackendError: the inspector does not tell.
    """
    inspector = engine.engine.create_engine_inspector()
    text = inspector.get_engine_information(engine.trt.LayerInformationFormat.JSON) if inspector else ""
    try:
        layers = json.loads(text)["Layers"]
        return tuple(_layer(layer) for layer in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"TensorRT {engine.trt.__version__} does not tell the layers of the engine (graph {engine.name}: "
            f"{error!r})"
        ) from None


def _layer(described: object) -> EngineLayer:
    if not isinstance(described, dict):
        return EngineLayer(str(described))
    kind = str(described.get("LayerType", ""))
    is_plugin = "plugin" in kind.lower()
    return EngineLayer(
        str(described["Name"]), kind, str(described.get("PluginType", "")) if is_plugin else None
    )
