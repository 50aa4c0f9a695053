"""The trt backend: engines by TensorRT-RTX (on any machine) or TensorRT (for the GPU that is present).

An engine holds its weights. Its graph is the onnx backend's, which ONNX Runtime can run anywhere: where
no GPU is at hand, that vouches for the numbers.
"""

import dataclasses
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from exporters import dynamic, trt_build, trt_room, trt_share, weights
from exporters.base import Exporter, ExportError, Request, StoredTensor, TensorSpec, VariantCode
from exporters.sdxl import DTYPES, Component, Configs, spec_of
from exporters.trt_build import Settings
from exporters.trt_flavor import FLAVORS, choose

GRAPH_LIBRARIES = ("onnx", "onnxscript", "onnx_graphsurgeon")


class TrtExporter(Exporter):
    """Traces on the meta device, points the graph at the weights file, and has TensorRT build it."""

    name = "trt"

    def check_request(self, request: Request) -> None:
        if request.device == "cpu" and not request.target.startswith("sm"):
            raise ExportError(
                f"TensorRT runs on NVIDIA GPUs; {request.target} was asked for.", "Name one: --gpu sm86, for example."
            )
        if request.precision not in DTYPES:
            raise ExportError(
                f"The trt backend has no precision {request.precision!r}.", f"It has: {', '.join(DTYPES)}."
            )
        settings = _settings(request)
        choose(settings.flavor, settings.targets, settings.targets[0] if request.device != "cpu" else "", ())
        missing = [name for name in GRAPH_LIBRARIES if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(
                f"The trt backend makes its graphs with {', '.join(missing)}, which is not installed.",
                "pip install 'sdxl-build[trt]'",
            )
        trt = trt_build.library(settings.flavor)
        if settings.flavor == "rtx":
            trt_build.check_targets(trt, settings.targets)
        elif not torch.cuda.is_available():
            raise ExportError(
                f"TensorRT builds on the GPU that is present, and torch {torch.__version__} sees none.",
                "Install a torch for CUDA, or use --flavor rtx.",
            )

    def check_room(self, parameters: Mapping[str, int], request: Request) -> int:
        width = 4 if request.precision == "fp32" else 2
        needed = {name: trt_room.build_bytes(count, width) for name, count in parameters.items()}
        return trt_room.at_once(needed, trt_room.free_memory(), FLAVORS[_settings(request).flavor].title)

    def layout(self, component: Component, configs: Configs, request: Request) -> dict[str, StoredTensor]:
        from exporters import onnx_graph

        return onnx_graph.described(component, configs, request)[1]

    def share(self, engine: Path, known: Mapping[str, Path]) -> dict[str, Path]:
        return trt_share.split(engine, known)

    def shared(self, component: str, engine: Path) -> dict[str, str]:
        return {digest: trt_share.part_name(component, digest) for digest in trt_share.parts_of(engine)}

    def _export(
        self, component: Component, variant: str, configs: Configs, request: Request, out: Path, stem: str
    ) -> VariantCode:
        drawn = graph(component, variant, configs, request, stem)
        log = out / f"{stem}.log"
        settings = dataclasses.replace(_settings(request), profile=_profile(drawn.inputs, request))
        try:
            with open(log, "w", encoding="utf-8") as messages:
                built = trt_build.build(drawn.file, out / f"{stem}.engine", messages, settings, self.progress)
        except ExportError:
            sys.stderr.write(log.read_text(encoding="utf-8"))  # this process's log is what is kept of a failure
            raise
        finally:
            drawn.file.unlink()
        return VariantCode(
            file=f"{stem}.engine",
            inputs=_in_order(stem, drawn.inputs, built.inputs),
            outputs=_in_order(stem, drawn.outputs, built.outputs),
            constants={},
            tensors={},
            others=(f"{stem}.log",),
        )


@dataclasses.dataclass(frozen=True)
class Graph:
    """An ONNX model's file, and what the component declares that it takes and gives."""

    file: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def graph(component: Component, variant: str, configs: Configs, request: Request, stem: str) -> Graph:
    """Writes the ONNX model that TensorRT builds, beside the folder of the weights that it refers to."""
    from exporters import onnx_graph

    place = Path(request.weights)
    if place.parts[-2:] != Path(weights.location(component.name)).parts:
        raise ValueError(f"the weights of {component.name} are at {place}")
    network = onnx_graph.trace(component, variant, configs, request)
    model = onnx_graph.clean(network.model)
    onnx_graph.attach(model, network.plan, weights.location(component.name))
    file = place.parents[1] / f"{stem}.onnx"
    file.write_bytes(model.SerializeToString(deterministic=True))
    described = (tuple(spec_of(n, t) for n, t in tensors.items()) for tensors in (network.inputs, network.outputs))
    return Graph(file, *described)


def _in_order(stem: str, declared: tuple[TensorSpec, ...], there: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The network's own tensors in the component's order.

    Raises:
        RuntimeError: they are not what the component declares: a run would compute nonsense.
    """
    by_name = {spec.name: spec for spec in there}
    if by_name.keys() != {spec.name for spec in declared} or not all(_fits(by_name[s.name], s) for s in declared):
        raise RuntimeError(f"the network of {stem} has {there}; the component declares {declared}")
    return declared


def _fits(found: TensorSpec, declared: TensorSpec) -> bool:
    """Whether a network's tensor is the component's, which may have any size where the network leaves it open."""
    if -1 not in found.shape:
        return found == declared
    pairs = list(zip(found.shape, declared.shape, strict=True)) if len(found.shape) == len(declared.shape) else []
    return found.dtype == declared.dtype and bool(pairs) and all(size in (-1, wanted) for size, wanted in pairs)


def _profile(inputs: tuple[TensorSpec, ...], request: Request) -> dict[str, dynamic.Shapes]:
    """The shapes of those inputs whose size is left open (``--dynamic``)."""
    sizes = request.options.get("dynamic")
    if sizes is None:
        return {}
    return {s.name: dynamic.shapes(s, sizes, request.width, request.height) for s in inputs if s.name in dynamic.SIZED}


def _settings(request: Request) -> Settings:
    flavor = str(request.options["flavor"])
    timings = None
    if request.caches and flavor == "tensorrt":
        card = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name(request.device))
        timings = Path(request.caches) / f"tensorrt-{card}.timing"
    return Settings(
        flavor=flavor,
        targets=tuple(request.target.split("+")),
        tf32=bool(request.options.get("tf32")),
        compatibility=str(request.options.get("compatibility", "none")),
        timing_cache=timings,
    )
