"""Runs the onediff backend's files: OneDiff in a process of its own interpreter, tensors through shared memory."""

import atexit
import contextlib
import functools
import json
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildtool.store import interpreter
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, Manifest, TensorSpec, Variant
from runtimes.base import Engine, Loader, check_target, rebuild_hint

SHARED = Path("/dev/shm")
ALIGNMENT = 256


class Worker:
    """A process of ``exporters/onediff_worker.py serve``: loads variants and calls them.

    It ends when its standard input closes: at :meth:`close`, or when this process ends, however it does.
    """

    def __init__(self, python: str, device: torch.device) -> None:
        self.python = python
        self._caches = tempfile.TemporaryDirectory(prefix="sdxl-onediff-")
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [python, str(interpreter.WORKER), "serve", str(device), self._caches.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=interpreter.environment(),
        )

    def ask(self, do: str, **asked: Any) -> dict[str, Any]:
        """Sends one message and waits for its answer.

        Raises:
            SdxlError: the worker refuses, fails, or has died; with the last line of its words.
        """
        to, back = self._process.stdin, self._process.stdout
        assert to is not None and back is not None
        data = json.dumps({"do": do, **asked}).encode()
        with self._lock:
            try:
                to.write(struct.pack("<I", len(data)) + data)
                to.flush()
            except OSError:
                raise self._died() from None
            head = back.read(4)
            if len(head) < 4:
                raise self._died()
            answer: dict[str, Any] = json.loads(back.read(struct.unpack("<I", head)[0]))
        if "error" in answer:
            raise SdxlError(f"OneDiff ({self.python}) failed: {answer['error'].rstrip('.')}.", answer["hint"])
        return answer

    def close(self) -> None:
        """Ends the process and removes its caches."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        self._process.wait()
        self._caches.cleanup()

    def _died(self) -> SdxlError:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
        return SdxlError(f"OneDiff's process ({self.python}) {how}: {lines[-1].strip()}.", "sdxl-build doctor")


class OnediffEngine(Engine):
    """A variant in the worker. Inputs and outputs lie in memory that both processes map.

    From a GPU they are copied to the host and back, 1.2 MB a guided step of full-size SDXL: handles of GPU memory would
    bind the two torches, which are years apart, to each other's formats.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        component: Component,
        variant: Variant,
        device: torch.device,
        worker: Worker,
    ) -> None:
        super().__init__(name, variant, device)
        self._worker = worker
        # Two artifacts may have variants of one name.
        self._name = str(path)
        places, size = _places([*variant.inputs, *variant.outputs])
        with tempfile.NamedTemporaryFile(dir=SHARED if SHARED.is_dir() else None) as file:
            file.truncate(size)
            self._memory = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
            specs = [
                {**_spec(spec), "offset": offset, "bytes": length}
                for spec, (offset, length) in zip([*variant.inputs, *variant.outputs], places, strict=True)
            ]
            stored = {n: t for n, t in component.tensors.items() if n in variant.constants.values()}
            loaded = worker.ask(
                "load",
                name=self._name,
                file=str(path.absolute()),
                weights=str((path.parent / component.weights).absolute()),
                tensors=[
                    {"name": n, "shape": t.shape, "dtype": t.dtype, "stride": t.stride} for n, t in stored.items()
                ],
                memory=file.name,
                bytes=size,
                inputs=specs[: len(variant.inputs)],
                outputs=specs[len(variant.inputs) :],
            )  # both have mapped it now: the file's name isn't needed any more
        if loaded["compiled"] or loaded["misses"]:
            what = ", ".join(Path(file).name for file in loaded["compiled"][:3]) or f"{loaded['misses']} graphs"
            raise SdxlError(
                f"{path} did not load as it was built: OneDiff compiled it anew ({what}).",
                "Its caches hold for the machine and the versions that built them; build it here again with --force.",
            )
        views = [_view(self._memory, spec, *place) for spec, place in zip(specs, places, strict=True)]
        self._given, self._made = views[: len(variant.inputs)], views[len(variant.inputs) :]

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        for view, tensor in zip(self._given, inputs, strict=True):
            view.copy_(tensor)  # from a GPU it returns when the copy is done
        self._worker.ask("call", name=self._name)
        if self.device.type == "cpu":
            return tuple(self._made)
        return tuple(view.to(self.device) for view in self._made)


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": spec.shape, "dtype": spec.dtype, "stride": spec.stride}


def _places(specs: Sequence[TensorSpec]) -> tuple[list[tuple[int, int]], int]:
    """Where each tensor lies in the shared memory, (offset, bytes), and how large that is."""
    places, offset = [], 0
    for spec in specs:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(spec.shape, spec.stride, strict=True))
        dtype: torch.dtype = getattr(torch, spec.dtype)
        places.append((offset, extent * dtype.itemsize))
        offset += -(-places[-1][1] // ALIGNMENT) * ALIGNMENT
    return places, offset


def _view(memory: Tensor, spec: Mapping[str, Any], offset: int, length: int) -> Tensor:
    flat = memory[offset : offset + length].view(getattr(torch, spec["dtype"]))
    return flat.as_strided(spec["shape"], spec["stride"])


@functools.cache
def _worker(python: str, device: torch.device) -> Worker:
    """The one process for all engines on a device: a torch and a CUDA context each would be dear."""
    worker = Worker(python, device)
    atexit.register(worker.close)
    return worker


class OnediffGraphLoader(Loader):
    name = "onediff_graph"

    def check_machine(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        python = interpreter.named()
        compiler, here = interpreter.choose(manifest.key.options["compiler"], python)
        built = {n.removeprefix("onediff."): v for n, v in manifest.key.toolchain.items() if n.startswith("onediff.")}
        for name in sorted(built.keys() | here.keys()):
            if built.get(name) != here.get(name):
                raise SdxlError(
                    f"{folder} was built with {name} {built.get(name, 'none')}; {python} has {here.get(name, 'none')}, "
                    f"and what {compiler} compiled holds for the versions that it was compiled with.",
                    rebuild_hint(manifest).removesuffix(" --force"),
                )
        check_target(folder, manifest, device)

    def _engine(
        self,
        path: Path,
        name: str,
        component: Component,
        variant: Variant,
        weights: Mapping[str, Tensor],
        options: Mapping[str, Any],
        device: torch.device,
    ) -> Engine:
        return OnediffEngine(path, name, component, variant, device, _worker(interpreter.named(), device))
