"""Runs the trt backend's engines, which hold their weights, with TensorRT or TensorRT-RTX on torch's stream."""

import contextlib
import logging
import mmap
import os
import shlex
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, Manifest, TensorSpec, Variant
from runtimes import timeline, trt_cache, trt_library, trt_pieces
from runtimes.base import Engine, Loader, rebuild_hint
from runtimes.cuda_graph import GraphedCall, GraphPool
from runtimes.gpu_upload import out_of_memory
from runtimes.trt_library import FLAVORS, Words

log = logging.getLogger("runtimes")

GRAPHS = "SDXL_TRT_GRAPHS"
"""Set to 0, engines are launched anew at every call instead of being replayed as CUDA graphs."""


class Device:
    """A library on one device: its runtime, and the activation memory that all engines there use in turn.

    One engine runs after the other on one stream, so one block as large as the largest needs serves all of them.
    """

    _made: dict[tuple[str, torch.device], "Device"] = {}  # noqa: RUF012

    def __init__(self, library: Any, title: str, device: torch.device) -> None:
        self.library, self.title, self.device = library, title, device
        self.words = Words()
        self._log = trt_library.logger(library, self.words)  # has to live as long as what is made with it
        with on(device):
            self.runtime = library.Runtime(self._log)
        self.activations: Tensor | None = None
        self._engines: weakref.WeakSet[TrtEngine] = weakref.WeakSet()

    @classmethod
    def of(cls, library: Any, title: str, device: torch.device) -> "Device":
        key = (title, device)
        if key not in cls._made:
            cls._made[key] = cls(library, title, device)
        return cls._made[key]

    def serve(self, engine: "TrtEngine", size: int) -> None:
        """Gives an engine its activation memory of ``size`` bytes; others move if the block has to grow."""
        self._engines.add(engine)
        if self.activations is None or self.activations.nbytes < size:
            self.activations = None  # before the next one is made: there may be no room for both
            for other in self._engines:
                other.move(None)
            self.activations = empty((max(size, 1),), torch.uint8, self.device)
            for other in self._engines:
                other.move(self.activations)
        else:
            engine.move(self.activations)

    def opened(self, path: Path) -> Any:
        """The engine of a file that is open already for other sizes, with its weights; else None."""
        there = (engine for engine in self._engines if engine.path == path)
        return next((engine._engine for engine in there if engine.sizes_are_open), None)

    @property
    def held(self) -> int:
        """Bytes of GPU memory that the engines here took by themselves, which torch doesn't count."""
        return sum(engine.memory["engine"] for engine in self._engines)


def held() -> int:
    """Bytes of GPU memory that TensorRT holds in this process and torch doesn't count."""
    return sum(device.held for device in Device._made.values())


class TrtEngine(Engine):
    """An engine file, deserialized from mappings of its files; on a GPU it runs as a CUDA graph.

    Outputs are buffers of its own. Activations lie in memory that all engines of the device share.

    Args:
        path: the engine's file.
        name: ``<component>.<variant>``.
        variant: what the manifest says of it.
        where: the library on the device.
        hint: what to do if the library refuses the file.
        graphs: whether to replay calls as a CUDA graph, where the library allows it.
    """

    def __init__(
        self, path: Path, name: str, variant: Variant, where: Device, hint: str = "", graphs: bool = True
    ) -> None:
        super().__init__(name, variant, where.device)
        self.path = path
        self._where, self._trt = where, where.library
        self._graph: GraphedCall | None = None
        self._cache: Any = None
        free = free_bytes(where.device)
        with timeline.span(f"open {name}"), on(where.device):
            self._engine = where.opened(path) or _deserialize(path, name.partition(".")[0], where, hint)
            self._check(path, variant, hint)
            self._context = self._make_context(path, name)
            self._choose_sizes(variant)
        self.memory = {
            "engine": max(0, free - free_bytes(where.device)),
            "activations": int(self._engine.device_memory_size_v2),
            "outputs": sum(_bytes(spec) for spec in variant.outputs),
        }
        """Bytes on the GPU: what the library took to load it, what it needs of the shared block, its outputs."""
        self._results = [
            empty(spec.shape, getattr(torch, spec.dtype), where.device).as_strided(spec.shape, spec.stride)
            for spec in variant.outputs
        ]
        where.serve(self, self.memory["activations"])
        for spec, tensor in zip(variant.outputs, self._results, strict=True):
            self._place(spec.name, tensor)
        if graphs and where.device.type == "cuda" and self._capturable():
            self._graph = GraphedCall(name, self._launch, variant.inputs, variant.outputs, where.device)
        log.info("%s: %s", name, ", ".join(f"{what} {size / 1e6:.1f} MB" for what, size in self.memory.items()))

    @property
    def sizes_are_open(self) -> bool:
        return any(-1 in tuple(self._engine.get_tensor_shape(spec.name)) for spec in self.inputs)

    def move(self, activations: Tensor | None) -> None:
        """Uses other activation memory from now on: a recorded graph holds the old address."""
        if self._graph is not None:
            self._graph.forget("its activation memory has moved")
        if activations is not None:
            self._context.set_device_memory(activations.data_ptr(), activations.nbytes)

    def _make_context(self, path: Path, name: str) -> Any:
        managed = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(self._trt, "IRuntimeCache"):
            context = self._engine.create_execution_context(managed)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(managed)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.DISABLED  # ours has the copies in it
            self._cache = Kernels(config, path, gpu_name(self.device), str(self._trt.__version__))
            context = self._engine.create_execution_context(config)
        if context is None:
            raise self._refused(f"can't prepare {name}")
        return context

    def _check(self, path: Path, variant: Variant, hint: str) -> None:
        """The engine has the manifest's tensors, or the file is another one's."""
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        found = {
            n: (tuple(self._engine.get_tensor_shape(n)), _dtype(self._engine.get_tensor_dtype(n).name)) for n in names
        }
        wanted = {spec.name: (tuple(spec.shape), spec.dtype) for spec in (*variant.inputs, *variant.outputs)}
        odd = sorted(n for n in found.keys() | wanted.keys() if not _fits(found.get(n), wanted.get(n)))
        if odd:
            raise SdxlError(f"{path} takes and gives other tensors than its manifest says: {', '.join(odd)}.", hint)

    def _choose_sizes(self, variant: Variant) -> None:
        """Tells the context the sizes of inputs that the engine leaves open; another size has a context of its own."""
        for spec in variant.inputs:
            if -1 in tuple(self._engine.get_tensor_shape(spec.name)) and not self._context.set_input_shape(
                spec.name, spec.shape
            ):
                raise self._refused(f"can't make {self.name} for {spec.name} of {tuple(spec.shape)}")

    def _capturable(self) -> bool:
        if os.environ.get(GRAPHS) == "0":
            return False
        asks = getattr(self._context, "is_stream_capturable", None)
        return asks is None or bool(asks(int(GraphPool.of(self.device).stream.cuda_stream)))

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        if self._graph is None:
            self._launch(inputs)
            results = tuple(self._results)
        else:
            results = self._graph(inputs)
        if self._cache is not None and self.calls == 1:
            self._cache.keep()
        return results

    def _launch(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        for spec, tensor in zip(self.inputs, inputs, strict=True):
            self._place(spec.name, tensor)
        if not self._context.execute_async_v3(stream(self.device)):
            raise self._refused(f"failed to run {self.name}")
        return self._results

    def _place(self, name: str, tensor: Tensor) -> None:
        if not self._context.set_tensor_address(name, tensor.data_ptr()):
            raise RuntimeError(f"{self.name}: {name} can't be at {tensor.data_ptr():#x}: {self._where.words.take()}")

    def _refused(self, what: str) -> Exception:
        return _refused(self._where, what, "See what is there: sdxl-build doctor")


class Kernels:
    """TensorRT-RTX's compiled kernels of one engine, read before its context is made and kept after its first run."""

    def __init__(self, config: Any, engine: Path, gpu: str, version: str) -> None:
        self._places = trt_cache.places(engine, gpu, version)
        self._cache = config.create_runtime_cache()
        self._known = trt_cache.read(self._places)
        if self._known and not self._cache.deserialize(self._known):
            self._known = b""  # another driver, for example: it is compiled anew
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Writes the kernels, if some are new. Where nothing can be written, the next start compiles again."""
        blob = self._cache.serialize()
        data = b"" if blob is None else bytes(memoryview(blob))
        if data and data != self._known and trt_cache.write(self._places, data) is None:
            log.info("Compiled kernels can be kept neither in %s nor in %s.", *(p.parent for p in self._places))
        self._known = data


def _deserialize(path: Path, component: str, where: Device, hint: str) -> Any:
    """The engine, from its files' pages: gigabytes are never in Python's memory, and the system may drop them again.

    Raises:
        SdxlError: the library refuses it: another version, another GPU, a damaged file, no room.
    """
    where.words.take()
    try:
        if trt_pieces.is_split(path):
            pieces = trt_pieces.Pieces(path, component)
            engine = where.runtime.deserialize_cuda_engine(trt_pieces.reader(where.library, pieces))
            pieces.close()
        else:
            engine = _from_file(path, where)
    except (OSError, ValueError) as error:  # mmap refuses an empty file
        raise SdxlError(f"{path} can't be read: {error}.", "Check it: sdxl-build verify") from None
    if engine is None:
        raise _refused(where, f"can't load {path}", hint)
    return engine


def _from_file(path: Path, where: Device) -> Any:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        pages.madvise(mmap.MADV_SEQUENTIAL)
        return where.runtime.deserialize_cuda_engine(pages)


def _refused(where: Device, what: str, hint: str) -> SdxlError:
    said = where.words.take()
    if "out of memory" in said.lower() or "outofmemory" in said.lower():
        free, total = torch.cuda.mem_get_info(where.device)
        return out_of_memory(f"what {where.title} {what.partition(' ')[2]}", free, total)
    return SdxlError(f"{where.title} {where.library.__version__} {what}: {said}.", hint)


def stream(device: torch.device) -> int:
    """The handle of torch's current stream."""
    return int(torch.cuda.current_stream(device).cuda_stream)


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The device as the current one, which the library uses."""
    return torch.cuda.device(device)


def free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else nobody outside of an inference mode could write to it again
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def _fits(found: Any, wanted: Any) -> bool:
    """Whether an engine's (shape, dtype) is the manifest's; -1 is a size that the engine leaves open."""
    if found is None or wanted is None or found[1] != wanted[1] or len(found[0]) != len(wanted[0]):
        return False
    return all(size in (-1, other) for size, other in zip(found[0], wanted[0], strict=True))


def _bytes(spec: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    count = dtype.itemsize
    for size in spec.shape:
        count *= size
    return count


def _dtype(name: str) -> str:
    """TensorRT's name of a type -> torch's."""
    known = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "FP8": "float8_e4m3fn"}
    return known.get(name, name.lower())


class TrtEngineLoader(Loader):
    """Engines run with the version of the library that built them, on the GPUs that they were built for."""

    name = "trt_engine"

    def check_machine(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        flavor = _flavor(folder, manifest)
        library = trt_library.load(
            flavor, trt_library.built_with(flavor, manifest.key.toolchain), again=rebuild_hint(manifest)
        )
        major, minor = torch.cuda.get_device_capability(device)
        here, name, key = f"sm{major}{minor}", gpu_name(device), manifest.key
        level = key.options.get("compatibility", "none")
        wider = level == "ampere+" and major >= 8
        if here not in key.target.split("+") and not wider:
            raise SdxlError(
                f"{folder} was built for {key.target.replace('+', ', ')}; {name} is {here}.",
                f"Build it for this GPU: {_command_for(manifest, here, library)}",
            )
        if key.gpu_name not in ("any", name) and level == "none":
            raise SdxlError(
                f"{folder} was built on {key.gpu_name} and is tuned for it; this is {name}.",
                f"Build it on this machine: {shlex.join(manifest.command)}",
            )

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
        flavor = FLAVORS[options["flavor"]]
        library = trt_library.load(flavor, ("", ""))
        hint = f"Build it again with this version: see sdxl-build show {path.parent}"
        return TrtEngine(path, name, variant, Device.of(library, flavor.title, device), hint)


def _flavor(folder: Path, manifest: Manifest) -> trt_library.Flavor:
    named = manifest.key.options.get("flavor")
    if named not in FLAVORS:
        raise SdxlError(
            f"{folder} names the flavor {named!r}; this installation knows: {', '.join(FLAVORS)}.",
            rebuild_hint(manifest),
        )
    return FLAVORS[named]


def _command_for(manifest: Manifest, target: str, library: Any) -> str:
    """The command that builds an artifact for another GPU, with the library that can."""
    words = [*manifest.command]
    words[words.index("--gpu") + 1] = target
    known = getattr(getattr(library, "ComputeCapability", None), "__members__", {})
    if "--flavor" in words:
        words[words.index("--flavor") + 1] = "rtx" if target.upper() in known else "tensorrt"
    return shlex.join(words)
