"""The onediff backend: OneDiff's compilers, in an interpreter of their own; caches or a graph in one file a variant."""

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.base import Exporter, ExportError, Request, StoredTensor, TensorSpec, VariantCode
from exporters.sdxl import DTYPES, Component, Configs

WORKER = Path(__file__).with_name("onediff_worker.py")
VARIABLE = "SDXL_ONEDIFF_PYTHON"


class OnediffExporter(Exporter):
    """Compiles in the Python that ``$SDXL_ONEDIFF_PYTHON`` names; the plan has seen that it has what is needed.

    The files are of no use without that interpreter: with nexfort a zip of what its compilers left in their caches,
    with oneflow of the saved graph.
    """

    name = "onediff"

    def check_request(self, request: Request) -> None:
        if not os.environ.get(VARIABLE):
            raise ExportError("OneDiff runs in a Python of its own, and none is named.", f"export {VARIABLE}=PATH")
        compiler = request.options["compiler"]
        if request.device == "cpu" and compiler == "oneflow":
            raise ExportError("OneDiff's compiler oneflow is for NVIDIA GPUs.", "On a CPU: --compiler nexfort")

    def _export(
        self, component: Component, variant: str, configs: Configs, request: Request, out: Path, stem: str
    ) -> VariantCode:
        dtype = DTYPES[component.precision(configs, request)]
        inputs = component.inputs(configs, request, variant, dtype)
        compiler = request.options["compiler"]
        code = {
            "compiler": compiler,
            "mode": request.options.get("mode", ""),
            "component": component.name,
            "config": {n: v for n, v in configs[component.source].items() if not n.startswith("_diffusers")},
            "dtype": str(dtype).removeprefix("torch."),
            "inputs": [{"name": s.name, "shape": s.shape, "dtype": s.dtype} for s in inputs],
            "outputs": component.outputs_of(variant),
        }
        file = out / f"{stem}.{compiler}"
        described = _compile({"code": code, "device": request.device, "file": str(file.absolute())}, out)
        return VariantCode(
            file=file.name,
            inputs=inputs,
            outputs=tuple(_spec(spec) for spec in described["outputs"]),
            constants={spec["name"]: spec["name"] for spec in described["parameters"]},
            tensors={
                spec["name"]: StoredTensor(
                    tuple(spec["shape"]),
                    spec["dtype"],
                    tuple(spec["stride"]),
                    (_source(component.source, spec["name"]),),
                )
                for spec in described["parameters"]
            },
        )


def _source(component: str, name: str) -> str:
    """The checkpoint's name of a parameter: transformers 5 dropped a prefix that files kept."""
    prefix = "text_model."
    if component.startswith("text_encoder") and not name.startswith((prefix, "text_projection.")):
        return prefix + name
    return name


def _spec(spec: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(spec["name"], tuple(spec["shape"]), spec["dtype"], tuple(spec["stride"]))


def _compile(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs the worker: what it says of the compiled variant.

    Raises:
        ExportError: it refused, or the compiler failed; its words are in the log.
    """
    asked, answer = folder.absolute() / "job.json", folder.absolute() / "result.json"
    asked.write_text(json.dumps({**job, "result": str(answer)}))
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([os.environ[VARIABLE], str(WORKER), "compile", str(asked)], env=environment)
    try:
        said: dict[str, Any] = json.loads(answer.read_bytes())
    except (OSError, ValueError):
        raise ExportError(f"OneDiff's Python ended with exit code {done.returncode} while it compiled.") from None
    finally:
        for path in (asked, answer):
            with contextlib.suppress(OSError):
                path.unlink()
    if "error" in said:
        raise ExportError(said["error"], said["hint"])
    return said
