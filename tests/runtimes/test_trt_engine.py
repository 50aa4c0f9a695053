"""The trt backend's run half: on a stand-in library in main memory, and (marked gpu) on the real one.

The stand-in has the calls that TensorRT-RTX 1.7 and TensorRT 11 share: it proves what is asked of them, in which
order, with which addresses; not that they answer as it does.
"""

import ctypes
import importlib
import mmap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from buildtool.store import machine
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Check, Manifest, TensorSpec, Variant
from exporters import trt_share
from runtimes import session, trt_cache, trt_engine, trt_library
from runtimes.trt_engine import Device, TrtEngine, TrtEngineLoader
from tests.runtimes.stand_in import stand_in_manifest

CPU = torch.device("cpu")
X = TensorSpec(name="x", shape=(2, 3), dtype="float16", stride=(3, 1))
Y = TensorSpec(name="y", shape=(2, 3), dtype="float16", stride=(3, 1))
VARIANT = Variant(
    file="unet.engine",
    inputs=(X,),
    outputs=(Y,),
    constants={},
    check=Check(status="deferred", error={}, tolerance=1.0, reason="stand-in"),
)


class Context:
    """A stand-in for IExecutionContext: y = x + 1, at the addresses that it was given."""

    def __init__(self, engine: "EngineStandIn", settings: Any) -> None:
        self.engine, self.settings = engine, settings
        self.addresses: dict[str, int] = {}
        self.activations: list[tuple[int, int]] = []
        self.streams: list[int] = []
        self.works = True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address % 2 == 0

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.activations.append((address, size))

    def execute_async_v3(self, stream: int) -> bool:
        assert self.activations, "no activation memory was given"
        self.streams.append(stream)
        x, y = ((ctypes.c_uint16 * 6).from_address(self.addresses[n]) for n in "xy")
        made = torch.frombuffer(x, dtype=torch.float16) + 1
        ctypes.memmove(y, made.numpy().tobytes(), 12)
        return self.works


class EngineStandIn:
    """A stand-in for ICudaEngine."""

    num_io_tensors = 2

    def __init__(self, size: int, shape: tuple[int, ...] = (2, 3)) -> None:
        self.device_memory_size_v2 = size
        self._shape = shape
        self.contexts: list[Context] = []

    def get_tensor_name(self, i: int) -> str:
        return "xy"[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name="HALF")

    def create_runtime_config(self) -> Any:
        return RuntimeConfig()

    def create_execution_context(self, settings: Any) -> Context:
        self.contexts.append(Context(self, settings))
        return self.contexts[-1]


class RuntimeConfig:
    """A stand-in for TensorRT-RTX's IRuntimeConfig."""

    strategy = cuda_graph_strategy = cache = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> "RuntimeCache":
        return RuntimeCache()

    def set_runtime_cache(self, cache: "RuntimeCache") -> None:
        self.cache = cache


class RuntimeCache:
    """A stand-in for IRuntimeCache: kernels of "driver 1" are taken, others refused."""

    def __init__(self) -> None:
        self.data = b"driver 1: compiled"

    def deserialize(self, data: bytes) -> bool:
        if data.startswith(b"driver 1"):
            self.data = data
            return True
        return False

    def serialize(self) -> bytes:
        return self.data


class Library(types.SimpleNamespace):
    """A stand-in for the module ``tensorrt_rtx``; files hold the size of their activations, or what is said of them."""

    __version__ = "1.7.1.116"
    ILogger = type("ILogger", (), {"__init__": lambda self: None})
    IRuntimeCache = RuntimeCache
    IStreamReaderV2 = type("IStreamReaderV2", (), {"__init__": lambda self: None})
    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    CudaGraphStrategy = types.SimpleNamespace(DISABLED="disabled")
    ComputeCapability = types.SimpleNamespace(__members__={"NONE": 0, "SM86": 1, "SM89": 2})

    class Runtime:
        """A stand-in for IRuntime."""

        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, pages: Any) -> EngineStandIn | None:
            streamed = isinstance(pages, Library.IStreamReaderV2)
            assert streamed or isinstance(pages, mmap.mmap)  # never gigabytes of Python's own
            said = self._stream(pages) if streamed else bytes(memoryview(pages))
            if said.isdigit():
                return EngineStandIn(int(said))
            self._log.log(types.SimpleNamespace(name="INFO"), "reading")
            self._log.log(types.SimpleNamespace(name="ERROR"), said.decode())
            self._log.log(types.SimpleNamespace(name="ERROR"), "and so on")
            return None

        def _stream(self, reader: Any) -> bytes:
            """Looks at the header, goes back, and reads to the end in bites."""
            assert len(reader.read(1, 0)) == 1 and reader.seek(0, types.SimpleNamespace(name="SET"))
            assert not reader.seek(10**9, types.SimpleNamespace(name="SET"))
            said = b""
            while data := reader.read(2, 0):
                said += data
            return said


class Proper(Library):
    """A stand-in for the module ``tensorrt``, which has no runtime cache."""

    __version__ = "11.4.0.106"

    def __getattribute__(self, name: str) -> Any:
        if name == "IRuntimeCache":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[int]]:
    """CUDA's calls in main memory: free memory is the list's one number."""
    room = [1000]
    monkeypatch.setattr(trt_engine, "stream", lambda device: 77)
    monkeypatch.setattr(trt_engine, "on", lambda device: Nothing())
    monkeypatch.setattr(trt_engine, "free_bytes", lambda device: room[0])
    monkeypatch.setattr(trt_engine, "gpu_name", lambda device: "Stand-in 3090")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Device, "_made", {})
    yield room


def engine(folder: Path, text: str, where: Device, name: str = "unet.cfg") -> TrtEngine:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.engine"
    path.write_text(text)
    return TrtEngine(path, name, VARIANT, where, "Build it again.")


@pytest.fixture
def where(free: list[int]) -> Device:
    return Device.of(Library(), "TensorRT-RTX", CPU)


def run(made: TrtEngine, x: Tensor) -> Tensor:
    return made(x=x)[0]


def test_inputs_and_outputs_are_torchs_memory_on_torchs_stream(where: Device, tmp_path: Path) -> None:
    made = engine(tmp_path / "a", "64", where)
    x = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    assert torch.equal(run(made, x), x + 1)
    other = x * 2  # at another address
    assert torch.equal(run(made, other), other + 1)
    context = made._context
    assert context.streams == [77, 77]
    assert context.addresses["x"] == other.data_ptr()
    assert (context.settings.strategy, context.settings.cuda_graph_strategy) == ("user managed", "disabled")


def test_wrong_inputs_never_reach_the_library(where: Device, tmp_path: Path) -> None:
    made = engine(tmp_path / "a", "64", where)
    with pytest.raises(ValueError, match="it was compiled for"):
        run(made, torch.zeros(2, 4, dtype=torch.float16))
    assert made._context.streams == []


def test_engines_share_one_block_of_activations_as_large_as_the_largest_needs(where: Device, tmp_path: Path) -> None:
    small, large = engine(tmp_path / "a", "64", where), engine(tmp_path / "a", "640", where, "vae_decoder")
    block = where.activations
    assert block is not None and block.nbytes == 640
    assert small._context.activations[-1] == large._context.activations[-1] == (block.data_ptr(), 640)
    third = engine(tmp_path / "a", "100", where, "text_encoder")
    assert where.activations is block and third._context.activations == [(block.data_ptr(), 640)]
    assert len(small._context.activations) == 2


def test_a_recorded_graph_is_forgotten_when_its_activations_move(where: Device, tmp_path: Path) -> None:
    made = engine(tmp_path / "a", "64", where)
    forgotten: list[str] = []
    made._graph = types.SimpleNamespace(forget=forgotten.append)  # a stand-in for GraphedCall
    engine(tmp_path / "a", "640", where, "vae_decoder")
    assert set(forgotten) == {"its activation memory has moved"}
    made._graph = None


def test_memory_is_reported(free: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Library):
        class Runtime(Library.Runtime):
            def deserialize_cuda_engine(self, pages: Any) -> EngineStandIn | None:
                free[0] -= 300
                return super().deserialize_cuda_engine(pages)

    where = Device.of(Hungry(), "TensorRT-RTX", CPU)
    made = engine(tmp_path / "a", "64", where)
    assert made.memory == {"engine": 300, "activations": 64, "outputs": 12}
    assert trt_engine.held() == 300
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 1000)
    assert session.peak_memory()["cuda"] >= 1300


def test_kernels_that_were_compiled_are_kept_beside_the_artifact(where: Device, tmp_path: Path) -> None:
    made = engine(tmp_path / "a", "64", where)
    kept = tmp_path / "a.unet.cfg.Stand-in-3090.1.7.1.116.jit"
    assert not kept.exists()
    run(made, torch.zeros(2, 3, dtype=torch.float16))
    assert kept.read_bytes() == b"driver 1: compiled"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["unet.cfg.engine"]  # which is sealed
    kept.write_bytes(b"driver 1: compiled before")
    assert engine(tmp_path / "a", "64", where)._cache._cache.data == b"driver 1: compiled before"
    kept.write_bytes(b"driver 2: compiled elsewhere")
    again = engine(tmp_path / "a", "64", where)
    assert again._cache._cache.data == b"driver 1: compiled"
    run(again, torch.zeros(2, 3, dtype=torch.float16))
    assert kept.read_bytes() == b"driver 1: compiled"


def test_where_the_artifact_is_read_only_kernels_are_kept_in_the_users_cache(
    where: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(tmp_path / "a", "64", where)
    real = Path.write_bytes

    def read_only(self: Path, data: Any) -> int:
        if self.parent == tmp_path:
            raise PermissionError(13, "Read-only file system")
        return real(self, data)

    monkeypatch.setattr(Path, "write_bytes", read_only)
    run(made, torch.zeros(2, 3, dtype=torch.float16))
    (kept,) = (tmp_path / "cache/sdxl-build/jit").iterdir()
    assert kept.name == "a.unet.cfg.Stand-in-3090.1.7.1.116.jit"
    assert trt_cache.read(trt_cache.places(tmp_path / "a/unet.cfg.engine", "Stand-in 3090", "1.7.1.116"))


def test_where_nothing_can_be_written_it_runs_all_the_same(where: Device, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    nowhere = [tmp_path / "none/x.jit", tmp_path / "cache/jit/x.jit"]
    assert trt_cache.write(nowhere, b"x") is None and trt_cache.read(nowhere) == b""


def test_tensorrt_proper_has_no_such_cache(free: list[int], tmp_path: Path) -> None:
    made = engine(tmp_path / "a", "64", Device.of(Proper(), "TensorRT", CPU))
    x = torch.ones(2, 3, dtype=torch.float16)
    assert torch.equal(run(made, x), x + 1)
    assert made._context.settings == "user managed"
    assert not list(tmp_path.glob("*.jit"))


def test_an_engine_that_the_library_refuses_is_told_in_its_own_words(where: Device, tmp_path: Path) -> None:
    with pytest.raises(SdxlError, match=r"TensorRT-RTX 1\.7\.1\.116 can't load .*unet\.cfg\.engine: for sm86") as told:
        engine(tmp_path / "a", "for sm86,\nnot for sm90.", where)
    assert told.value.message.endswith("for sm86, not for sm90.") and told.value.hint == "Build it again."
    with pytest.raises(SdxlError, match=r"can't be read.*sdxl-build verify"):
        engine(tmp_path / "a", "", where)


def test_an_engine_in_pieces_is_streamed_from_where_they_are(where: Device, tmp_path: Path) -> None:
    (tmp_path / "a/weights").mkdir(parents=True)
    path = tmp_path / "a/unet.cfg.engine"
    path.write_bytes(b"6400")
    for digest, part in trt_share.split(path, {}).items():
        part.rename(tmp_path / "a" / trt_share.part_name("unet", digest))
    made = TrtEngine(path, "unet.cfg", VARIANT, where)
    assert made.memory["activations"] == 6400
    (part,) = (tmp_path / "a/weights").iterdir()
    part.write_bytes(b"64")
    with pytest.raises(SdxlError, match=r"unet\.cfg\.engine can't be read: it is cut short.*sdxl-build verify"):
        TrtEngine(path, "unet.cfg", VARIANT, where)
    part.unlink()
    with pytest.raises(SdxlError, match=r"unet-.*\.part is missing"):
        TrtEngine(path, "unet.cfg", VARIANT, where)


@pytest.mark.parametrize("header", [b"{", b'{"parts": ["../../../etc/passwd"]}', b"[]"])
def test_a_damaged_list_of_pieces_is_told(header: bytes, where: Device, tmp_path: Path) -> None:
    path = tmp_path / "unet.cfg.engine"
    path.write_bytes(trt_share.MAGIC + len(header).to_bytes(8, "little") + header)
    with pytest.raises(SdxlError, match=r"unet\.cfg\.engine can't be read.*sdxl-build verify"):
        TrtEngine(path, "unet.cfg", VARIANT, where)


def test_a_full_gpu_is_told_with_the_numbers(where: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000_000, 8_000_000_000))
    with pytest.raises(SdxlError, match=r"no room for .*1\.00 GB of its 8\.0 GB are free"):
        engine(tmp_path / "a", "Requested amount of GPU memory: Out of memory", where)


def test_an_engine_of_another_network_is_refused(
    where: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineStandIn, "get_tensor_shape", lambda self, name: (2, 3) if name == "x" else (4, 4))
    with pytest.raises(SdxlError, match=r"other tensors than its manifest says: y\. Build it again"):
        engine(tmp_path / "a", "64", where)


def test_a_run_that_fails_says_so(where: Device, tmp_path: Path) -> None:
    made = engine(tmp_path / "a", "64", where)
    made._context.works = False
    with pytest.raises(SdxlError, match=r"failed to run unet\.cfg: it gave no reason"):
        run(made, torch.zeros(2, 3, dtype=torch.float16))


# What keeps an artifact from running here, before anything is loaded


def listed(**changes: Any) -> Manifest:
    plain = stand_in_manifest()
    options = {"flavor": "rtx", "tf32": True, "compatibility": "none", "golden": True}
    fields = {
        "backend": "trt",
        "target": "sm86+sm89",
        "options": options,
        "toolchain": {"tensorrt_rtx": "1.7.1.116"},
        "precision": "fp16",
    }
    key = msgspec.structs.replace(plain.key, **{**fields, **changes})
    words = ("sdxl-build", "trt", "--model", "tiny", "--gpu", "sm86,sm89", "--flavor", "rtx", "--artifacts", "a")
    return msgspec.structs.replace(plain, key=key, command=words)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, free: list[int]) -> Any:
    """A machine with a stand-in library and a GPU of some capability."""

    def be(capability: tuple[int, int] = (8, 6), library: Any = None, version: str = "1.7.1.116") -> None:
        there = library or Library()
        monkeypatch.setattr(trt_library.importlib, "import_module", lambda name: there)
        monkeypatch.setattr(machine, "versions", lambda *names: dict.fromkeys(names, version))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return be


def check(**changes: Any) -> None:
    TrtEngineLoader().check_machine(Path("a"), listed(**changes), CPU)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9)])
def test_every_target_of_the_artifact_is_accepted(gpu: Any, capability: tuple[int, int]) -> None:
    gpu(capability)
    check()


def test_another_gpu_is_told_with_the_command_that_builds_for_it(gpu: Any) -> None:
    gpu((9, 0))
    with pytest.raises(SdxlError) as told:
        check()
    assert told.value.message == "a was built for sm86, sm89; Stand-in 3090 is sm90."
    assert told.value.hint.endswith("sdxl-build trt --model tiny --gpu sm90 --flavor tensorrt --artifacts a")
    gpu((8, 9))
    with pytest.raises(SdxlError, match="--gpu sm89 --flavor rtx"):
        check(target="sm86")


def test_another_version_is_told_with_the_pip_line_and_the_command_that_builds_again(gpu: Any) -> None:
    gpu(version="1.8.0.1")
    with pytest.raises(SdxlError, match=r"built with TensorRT-RTX 1\.7\.1\.116; 1\.8\.0\.1 is installed") as told:
        check()
    assert told.value.hint.startswith(
        "pip install tensorrt_rtx==1.7.1.116. Build it again: sdxl-build trt --model tiny"
    )


def test_a_missing_library_is_told_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(trt_library.importlib, "import_module", absent)
    with pytest.raises(
        SdxlError, match=r"TensorRT-RTX 1\.7\.1\.116, which is not installed\. pip install tensorrt_rtx=="
    ):
        check()


def test_a_library_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(trt_library.importlib, "import_module", broken)
    with pytest.raises(SdxlError, match=r"does not start: libcuda\.so\.1"):
        check()


def test_a_flavor_that_nobody_knows_is_refused(gpu: Any) -> None:
    gpu()
    with pytest.raises(SdxlError, match="names the flavor 'x'"):
        check(options={"flavor": "x"})


def test_tensorrt_proper_runs_on_the_gpu_that_it_was_tuned_on_or_on_those_it_was_told_to(gpu: Any) -> None:
    settings: dict[str, Any] = {"toolchain": {"tensorrt": "11.4"}, "target": "sm86", "gpu_name": "Stand-in A10"}
    options = {"flavor": "tensorrt", "tf32": True, "golden": True}
    gpu(version="11.4")
    with pytest.raises(SdxlError, match=r"tuned for it; this is Stand-in 3090\. Build it on this machine: sdxl-build"):
        check(**settings, options={**options, "compatibility": "none"})
    check(**settings, options={**options, "compatibility": "same"})
    check(**{**settings, "gpu_name": "Stand-in 3090"}, options={**options, "compatibility": "none"})
    gpu((9, 0), version="11.4")
    check(**settings, options={**options, "compatibility": "ampere+"})
    with pytest.raises(SdxlError, match="was built for sm86"):
        check(**settings, options={**options, "compatibility": "same"})
    gpu((7, 5), version="11.4")
    with pytest.raises(SdxlError, match="was built for sm86"):
        check(**settings, options={**options, "compatibility": "ampere+"})


# With a GPU


@pytest.mark.gpu
def test_a_gpu_that_an_engine_was_not_built_for_is_refused_by_the_library_too(tiny_trt_artifact: Path) -> None:
    """The library reads the header, refuses, and names the engine's targets; our line repeats that."""
    library = importlib.import_module("tensorrt_rtx")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU that torch can use")
    major, minor = torch.cuda.get_device_capability()
    if f"sm{major}{minor}" in ("sm86", "sm89", "sm120"):
        pytest.skip("this GPU is one of the engine's targets")
    device = Device.of(library, "TensorRT-RTX", torch.device("cuda", 0))
    with pytest.raises(SdxlError, match=r"TensorRT-RTX .* can't load .*text_encoder\.engine: .*8.?6"):
        TrtEngine(tiny_trt_artifact / "text_encoder.engine", "text_encoder.main", VARIANT, device)
