"""TensorRT's builder: an ONNX file becomes an engine file, with its messages kept, progress told, and a way to stop.

Both flavors have one API; what differs is said where it does.
"""

import contextlib
import dataclasses
import importlib
import os
import signal
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from exporters.base import ExportError, TensorSpec
from exporters.dynamic import Shapes
from exporters.trt_flavor import FLAVORS

DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
    "BOOL": "bool",
}
"""TensorRT's names of types -> torch's."""
LEVELS = {"none": "NONE", "same": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
"""``--compatibility`` -> TensorRT's HardwareCompatibilityLevel."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an engine is built.

    Args:
        flavor: ``rtx`` or ``tensorrt``.
        targets: such as ``sm86``; with ``tensorrt`` the GPU that is present.
        tf32: whether fp32 products may use TF32.
        compatibility: which other GPUs shall run an engine of ``tensorrt``, a key of :data:`LEVELS`.
        timing_cache: ``tensorrt``'s timings of earlier builds, read and written; None for none.
        profile: input -> its smallest, best and largest shape, for inputs whose shape isn't fixed.
    """

    flavor: str
    targets: tuple[str, ...]
    tf32: bool
    compatibility: str = "none"
    timing_cache: Path | None = None
    profile: Mapping[str, Shapes] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Built:
    """What the network that was built takes and gives, in its own words: -1 for what an open size is."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def library(flavor: str) -> Any:
    """The flavor's Python module.

    Raises:
        ExportError: it isn't installed, or doesn't start.
    """
    row = FLAVORS[flavor]
    try:
        return importlib.import_module(row.module)
    except ImportError as error:
        if error.name == row.module:
            raise ExportError(f"{row.title} is not installed, and building with it needs it.", row.install) from None
        raise ExportError(f"{row.title} is installed and does not start: {error}.", row.install) from error
    except OSError as error:
        raise ExportError(f"{row.title} is installed and does not start: {error}.", row.install) from error


def build(
    onnx_file: Path, engine: Path, messages: TextIO, settings: Settings, progress: Callable[[float], None]
) -> Built:
    """Builds an engine of a strongly typed network. Ctrl-C ends it at the builder's next step.

    Args:
        onnx_file: the model; its external data lies where it says.
        engine: the file to write.
        messages: what the parser and the builder say, a line each.
        progress: told the part that is done, from 0 to 1.

    Raises:
        ExportError: the parser or the builder refuses it, in their own words.
        KeyboardInterrupt: it was interrupted.
    """
    trt, title = library(settings.flavor), FLAVORS[settings.flavor].title
    log = _log(trt, messages, str(onnx_file.parent))
    builder = trt.Builder(log)
    network, parser = parse(trt, builder, log, onnx_file)
    built = Built(_specs(network.num_inputs, network.get_input), _specs(network.num_outputs, network.get_output))
    config = builder.create_builder_config()
    cache = configure(trt, config, settings)
    if settings.profile:
        profile = builder.create_optimization_profile()
        for name, shapes in settings.profile.items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
    stop = threading.Event()
    config.progress_monitor = monitor = _monitor(trt, progress, stop)
    with _interruptible(stop), open(engine, "wb") as file:
        done = _write(trt, builder, network, config, file)
    del monitor, parser
    if not done:
        raise ExportError(f"{title} {trt.__version__} can't build {engine.stem}: {log.said()}")
    if cache is not None and settings.timing_cache is not None:
        _keep(settings.timing_cache, memoryview(cache.serialize()))
    return built


def parse(trt: Any, builder: Any, log: Any, onnx_file: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, strongly typed: every tensor has the type that the graph says.

    Returns:
        The network and its parser, which has the weights and must live as long.

    Raises:
        ExportError: the parser refuses it.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_file)):
        said = _one_line("; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors)) or log.said())
        title = next((row.title for row in FLAVORS.values() if row.module == trt.__name__), "TensorRT")
        raise ExportError(f"{title} {trt.__version__} can't read the graph of {onnx_file.stem}: {said}")
    allow_plain_attention(trt, network)
    return network, parser


def allow_plain_attention(trt: Any, network: Any) -> int:
    """Lets the builder make attention of plain operators where it has no kernel for a shape (heads of 8, say).

    Without that such a model couldn't be built at all; SDXL's own shapes have kernels and keep them. Returns how
    many attention layers there are.
    """
    kind = getattr(trt.LayerType, "ATTENTION_OUTPUT", None)
    found = 0
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if kind is not None and layer.type == kind:
            layer.__class__ = trt.IAttentionOutputLayer  # TensorRT's own way to get from a layer to its kind
            layer.attention.decomposable = True
            found += 1
    return found


def configure(trt: Any, config: Any, settings: Settings) -> Any:
    """Sets what an engine is built for; returns the timing cache that is filled meanwhile, if there is one.

    Raises:
        ExportError: the library that is installed doesn't build for a target.
    """
    (config.set_flag if settings.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if settings.flavor == "rtx":
        known = check_targets(trt, settings.targets)
        config.num_compute_capabilities = len(settings.targets)
        for i, name in enumerate(settings.targets):
            if not config.set_compute_capability(known[name], i):
                raise ExportError(f"TensorRT-RTX {trt.__version__} does not build for {name}.")
        return None
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, LEVELS[settings.compatibility])
    if settings.timing_cache is None:
        return None
    known_timings = settings.timing_cache.read_bytes() if settings.timing_cache.is_file() else b""
    cache = config.create_timing_cache(known_timings)
    config.set_timing_cache(cache, False)  # timings of another GPU or version are refused
    return cache


def check_targets(trt: Any, targets: Sequence[str]) -> dict[str, Any]:
    """Targets as TensorRT-RTX's ComputeCapability.

    Raises:
        ExportError: the library that is installed doesn't know one.
    """
    known = trt.ComputeCapability.__members__
    unknown = [name for name in targets if name.upper() not in known]
    if unknown:
        there = ", ".join(name.lower() for name in known if name.startswith("SM"))
        raise ExportError(
            f"TensorRT-RTX {trt.__version__} builds for {there}, not for {', '.join(unknown)}.",
            "A newer one may: pip install -U tensorrt_rtx",
        )
    return {name: known[name.upper()] for name in targets}


def _write(trt: Any, builder: Any, network: Any, config: Any, file: Any) -> bool:
    if not hasattr(trt, "IStreamWriter") or not hasattr(builder, "build_serialized_network_to_stream"):
        serialized = builder.build_serialized_network(network, config)  # TensorRT before 10.13
        return serialized is not None and file.write(memoryview(serialized)) > 0

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        """Large engines come in pieces of 64 MB: none is in memory twice."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return int(file.write(data))

    return bool(builder.build_serialized_network_to_stream(network, config, Writer()))


def _specs(count: int, get: Callable[[int], Any]) -> tuple[TensorSpec, ...]:
    """Tensors of a network; TensorRT's linear format is contiguous."""
    found = []
    for tensor in (get(i) for i in range(count)):
        shape = tuple(tensor.shape)
        stride, step = [], 1
        for size in reversed(shape):
            stride.append(step)
            step *= size
        found.append(TensorSpec(tensor.name, shape, DTYPES[tensor.dtype.name], tuple(reversed(stride))))
    return tuple(found)


def _log(trt: Any, messages: TextIO, folder: str) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Writes messages to a file, without this machine's paths."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lock = threading.Lock()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.VERBOSE:
                return
            line = message.strip().replace(f"{folder}/", "").replace("\n", " ")
            with self._lock:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self._errors.append(line)
                messages.write(f"{severity.name.lower()}: {line}\n")
                messages.flush()

        def said(self) -> str:
            """The first error, which names the cause; later ones follow from it."""
            return _one_line(self._errors[0]) if self._errors else "it said nothing"

    return Log()


def _one_line(words: str) -> str:
    return " ".join(words.split())[:400].rstrip(".")


def _monitor(trt: Any, progress: Callable[[float], None], stop: threading.Event) -> Any:
    phases = Phases()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Called from any of the builder's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            phases.start(name, parent, steps)

        def step_complete(self, name: str, step: int) -> bool:
            progress(phases.step(name, step))
            return not stop.is_set()

        def phase_finish(self, name: str) -> None:
            progress(phases.finish(name))

    return Monitor()


class Phases:
    """The builder's phases, which lie in each other, as one part from 0 to 1 that never goes back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: dict[str, tuple[str | None, int, int]] = {}  # name -> parent, steps, steps done
        self._told = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._running[name] = (parent, max(1, steps), 0)

    def step(self, name: str, step: int) -> float:
        """The part that is done after a step, counted from 0, of a phase."""
        with self._lock:
            if name in self._running:
                parent, steps, _ = self._running[name]
                self._running[name] = (parent, steps, min(step + 1, steps))
            return self._part()

    def finish(self, name: str) -> float:
        with self._lock:
            parent, _, _ = self._running.pop(name, (None, 1, 1))
            if parent is None and not self._running:
                self._told = 1.0
            return self._part()

    def _part(self) -> float:
        top = next((name for name, (parent, _, _) in self._running.items() if parent is None), None)
        if top is not None:
            self._told = max(self._told, self._of(top))
        return self._told

    def _of(self, name: str) -> float:
        _, steps, done = self._running[name]
        below = [self._of(child) for child, (parent, _, _) in self._running.items() if parent == name]
        return min(1.0, (done + max(below, default=0.0)) / steps)


@contextlib.contextmanager
def _interruptible(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C tells the builder to stop, instead of raising inside of a call that C++ made."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(number: int, frame: types.FrameType | None) -> None:
        stop.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if stop.is_set():
            raise KeyboardInterrupt


def _keep(path: Path, data: memoryview) -> None:
    """Writes a cache that other builds may read meanwhile; one that can't be written costs time and nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{path.name}.{os.getpid()}")
        staged.write_bytes(data)
        staged.replace(path)
