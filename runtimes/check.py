"""Golden tensors through an artifact's engines: ``python -m runtimes.check DIR``.

Runs in a process of its own, because compiled code that is wrong can take the process with it.
"""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Variant
from runtimes import stages
from runtimes.artifact import Artifact, device_for
from runtimes.base import Engine
from runtimes.weights import Weights

GOLDEN = "golden.safetensors"
log = logging.getLogger("runtimes")


@torch.inference_mode()
def errors(artifact: Artifact, component: str, variant: str, engine: Engine) -> dict[str, float]:
    """Output -> relative error ||out - golden|| / ||golden|| against fp32 eager; inf where out isn't finite.

    Raises:
        SdxlError: the artifact has no golden tensors of this variant.
    """
    golden = _golden(artifact.folder, f"{component}.{variant}.")
    try:
        inputs = {spec.name: golden[f"input.{spec.name}"].to(artifact.device) for spec in engine.inputs}
        wanted = {spec.name: golden[f"output.{spec.name}"] for spec in engine.outputs}
    except KeyError as error:
        raise SdxlError(f"{artifact.folder / GOLDEN} lacks {component}.{variant}.{error.args[0]}.") from None
    made = engine(**inputs)
    return {name: _error(out, want) for (name, want), out in zip(wanted.items(), made, strict=True)}


def _error(out: Tensor, golden: Tensor) -> float:
    out, golden = out.double().cpu(), golden.double()
    if out.shape != golden.shape or not torch.isfinite(out).all():
        return float("inf")
    return float((out - golden).norm() / golden.norm())


def _golden(folder: Path, prefix: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / GOLDEN, framework="pt") as file:
            return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise SdxlError(f"{folder / GOLDEN} can't be read: {error}.", "Check it: sdxl-build verify") from None


def failed(error: dict[str, float], variant: Variant) -> bool:
    """Whether an output is further from fp32 eager than the manifest allows (NaN never passes)."""
    return not all(value <= variant.check.tolerance for value in error.values())


def ensure(artifact: Artifact, component: str, variant: str, engine: Engine) -> None:
    """Checks a variant whose check was deferred to the machine that runs it, once.

    An artifact that was built without golden tensors can't be checked: its manifest says so, and so does the log.
    The result is kept outside the artifact, which may be read-only and is sealed anyway.

    Raises:
        SdxlError: the engine's numbers are further from fp32 eager than allowed.
    """
    if GOLDEN not in artifact.manifest.files:
        log.warning("%s: %s.%s runs unchecked: no golden tensors were built.", artifact.folder, component, variant)
        return
    where = torch.cuda.get_device_name(artifact.device) if artifact.device.type == "cuda" else "cpu"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxl-build" / "checks"
    record = cache / f"{artifact.manifest.digest}.json"
    try:
        known: dict[str, Any] = json.loads(record.read_bytes())
    except (OSError, ValueError):
        known = {}
    name = f"{component}.{variant} on {where}"
    if name in known:
        return
    form = artifact.manifest.components[component].variants[variant]
    error = errors(artifact, component, variant, engine)
    if failed(error, form):
        raise SdxlError(
            f"{artifact.folder}: {component}.{variant} is off by {max(error.values()):.2e} from fp32 eager here; "
            f"{form.check.tolerance:.0e} is allowed.",
            "Build it on this machine.",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        staged = record.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps({**known, name: error}))
        staged.replace(record)
    except OSError:
        pass  # a machine without a writable cache checks again at its next start


def check(folder: Path, device: str | None = None) -> dict[str, dict[str, Any]]:
    """Every variant of an artifact against its golden tensors.

    Segments take turns in memory, and components too then: what is built for a small GPU is checked on one.

    Returns:
        ``<component>.<variant>`` -> ``error`` by output, ``tolerance``, ``passed``, ``activation_bytes``.
    """
    manifest = manifests.read(folder)
    if GOLDEN not in manifest.files:
        raise SdxlError(f"{folder} was built without golden tensors to check it with.", "Build it with them: --golden")
    where = device_for(manifest, device)
    turns = "segments" in manifest.key.options
    artifact = Artifact(folder, manifest, where, Weights(where, offload=turns, sequential=turns), {})
    results: dict[str, dict[str, Any]] = {}
    for component, described in manifest.components.items():
        for variant, form in described.variants.items():
            if turns:
                stages.free(artifact, ())
            engine = artifact.unchecked_engine(component, variant)
            with _allocated(where) as most:
                error = errors(artifact, component, variant, engine)
            del engine
            results[f"{component}.{variant}"] = {
                "error": error,
                "activation_bytes": most[0],
                "tolerance": form.check.tolerance,
                "passed": not failed(error, form),
            }
    return results


@contextlib.contextmanager
def _allocated(device: torch.device) -> Iterator[list[int]]:
    """The most that torch allocated on a GPU in this context beyond what it had, in bytes; 0 on a CPU."""
    most = [0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield most
    if device.type == "cuda":
        most[0] = torch.cuda.max_memory_allocated(device) - before


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--device", help="Where to run; default what the artifact was built for.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def main(folder: Path, device: str | None, as_json: bool) -> None:
    """Runs the golden tensors of the artifact FOLDER through its engines; - is the folder on stdin's first line."""
    if str(folder) == "-":
        line = os.fsdecode(sys.stdin.buffer.readline().rstrip(b"\n"))
        if not line:  # whoever started this process doesn't need it any more
            sys.exit(1)
        folder = Path(line)
    try:
        results = check(folder, device)
    except SdxlError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps({"variants": results}))
    else:
        for name, result in results.items():
            worst = max(result["error"].values())
            word = "ok" if result["passed"] else "FAILED"
            click.echo(f"{name}: {word}, relative error {worst:.2e}, {result['tolerance']:.0e} allowed")
    sys.exit(0 if all(r["passed"] for r in results.values()) else 1)


if __name__ == "__main__":
    main()
