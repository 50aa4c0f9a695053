"""The trt backend's build half: real engines by TensorRT-RTX with no GPU; TensorRT proper by a stand-in library."""

import dataclasses
import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from buildtool import models, plan
from buildtool.plan import Plan, Spec
from buildtool.store import machine, manifest
from buildtool.store.errors import SdxlError
from buildtool.store.store import verify_files
from exporters import registry, sdxl, trt_build, trt_engine, trt_flavor, trt_room, weights
from exporters.base import ExportError, Request, TensorSpec
from exporters.trt_build import Phases, Settings
from runtimes.trt_pieces import Pieces
from tests.test_errors import BUILD, NEEDS_RTX, call, one_line

OPTIONS = {"flavor": "rtx", "tf32": True, "compatibility": "none", "golden": True}
REQUEST = Request(64, 64, 1, "fp16", "cpu", "sm86+sm120", OPTIONS)


# Whole artifacts


@pytest.mark.slow
@NEEDS_RTX
def test_an_artifact_for_gpus_that_are_not_here(tiny_trt_artifact: Path) -> None:
    """Names, shapes and dtypes in the manifest are those of the networks, and those that the components declare."""
    listed = manifest.read(tiny_trt_artifact)
    assert (listed.key.target, listed.key.gpu_name, listed.key.precision) == ("sm86+sm89+sm120", "any", "fp16")
    assert listed.key.options == OPTIONS
    assert listed.key.toolchain["tensorrt_rtx"] == machine.versions("tensorrt_rtx")["tensorrt_rtx"]
    source = models.resolve("tiny")
    request = Request(256, 256, 1, "fp16", "cpu", listed.key.target, OPTIONS)
    for row in (sdxl.component(name) for name in plan.COMPONENTS):
        component = listed.components[row.name]
        assert (component.loader, component.weights, component.tensors) == ("trt_engine", "", {})
        assert tuple(component.variants) == row.variants
        for name, variant in component.variants.items():
            dtype = sdxl.DTYPES[row.precision(source.configs, request)]
            declared = row.inputs(source.configs, request, name, dtype)
            assert [(s.name, s.shape, s.dtype, s.stride) for s in variant.inputs] == [
                (s.name, s.shape, s.dtype, s.stride) for s in declared
            ]
            assert tuple(s.name for s in variant.outputs) == row.outputs
            assert variant.check.status == "deferred"
            assert "built for sm86+sm89+sm120 where there is no such GPU" in variant.check.reason
            log = variant.file.replace(".engine", ".log")
            assert log in listed.files
            words = (tiny_trt_artifact / log).read_text()
            assert "Engine generation completed" in words and str(Path.home()) not in words and "/tmp" not in words
            if row.source != "vae":  # of which the decoder is a half
                held = Pieces(tiny_trt_artifact / variant.file, row.name).size
                assert held > 2 * source.parameters[row.source]
    assert verify_files(tiny_trt_artifact) == []


@pytest.mark.slow
@NEEDS_RTX
def test_what_was_built_is_a_hit_and_says_how_to_build_it(tiny_trt_artifact: Path, store_root: Path) -> None:
    words = ["trt", "--model", "tiny", "--gpu", "sm120,sm86,sm89", "--artifacts", str(store_root)]
    done = call(*BUILD, *words)
    assert done.stdout.strip() == str(tiny_trt_artifact), done.stderr
    assert "--gpu sm86,sm89,sm120" in " ".join(manifest.read(tiny_trt_artifact).command)


@pytest.mark.slow
@NEEDS_RTX
def test_without_golden_tensors_the_engines_are_the_same_and_a_check_says_why(
    tiny_trt_artifact: Path, store_root: Path
) -> None:
    words = ["trt", "--model", "tiny", "--gpu", "sm86,sm89,sm120", "--no-golden", "--json"]
    done = call(*BUILD, *words, "--artifacts", store_root)
    assert done.returncode == 0, done.stderr
    (built,) = json.loads(done.stdout)["artifacts"]
    assert built["compiled"] == []
    listed = manifest.read(built["path"])
    assert "golden.safetensors" not in listed.files
    assert (Path(built["path"]) / "unet.cfg.engine").samefile(tiny_trt_artifact / "unet.cfg.engine")
    assert "--no-golden" in listed.command
    assert {v.check.reason for c in listed.components.values() for v in c.variants.values()} == {
        "built with --no-golden: there are no golden tensors to compare with"
    }


@pytest.mark.slow
@NEEDS_RTX
def test_a_run_without_the_gpu_is_refused(tiny_trt_artifact: Path) -> None:
    done = call(sys.executable, "-m", "runtimes.cli", "--engine", tiny_trt_artifact, "--prompt", "x")
    one_line(done, "was built for sm86+sm89+sm120", "no GPU here")


# One engine


@pytest.fixture
def job(tmp_path: Path) -> Any:
    """A function of a component, its request and source: what the builder prepares for the exporter."""

    def prepare(name: str, request: Request = REQUEST, model: str = "random:tiny") -> tuple[Any, Any, Request]:
        row, source = sdxl.component(name), models.resolve(model)
        file = tmp_path / weights.location(name)
        file.parent.mkdir(exist_ok=True)
        plan = trt_engine.TrtExporter().layout(row, source.configs, request)
        weights.write(file, plan, source.tensors(row.source))
        return row, source, dataclasses.replace(request, weights=str(file))

    return prepare


@pytest.mark.slow
@NEEDS_RTX
def test_the_network_is_strongly_typed_and_the_one_that_onnxruntime_vouches_for(job: Any, tmp_path: Path) -> None:
    """The graph that TensorRT parses, run by ONNX Runtime, gives what fp32 eager gives, within fp16's tolerance."""
    import onnxruntime
    import tensorrt_rtx as trt

    row, source, request = job("text_encoder_2")
    drawn = trt_engine.graph(row, "main", source.configs, request, "text_encoder_2")
    builder = trt.Builder(log := trt.Logger(trt.Logger.ERROR))
    network, parser = trt_build.parse(trt, builder, log, drawn.file)
    assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    found = {network.get_output(i).name: tuple(network.get_output(i).shape) for i in range(network.num_outputs)}
    assert found == {"hidden_states": (1, 77, 160), "text_embeds": (1, 160)}
    assert {network.get_output(i).dtype for i in range(network.num_outputs)} == {trt.float16}
    del network, parser

    inputs = sdxl.example_inputs(row, source.configs, request, "main")
    session = onnxruntime.InferenceSession(drawn.file, providers=["CPUExecutionProvider"])
    made = session.run(None, {n: t.numpy() for n, t in inputs.items()})
    with torch.no_grad():
        wanted = row.reference(source.configs[row.source], source.tensors(row.source), "cpu")(**inputs)
    for got, want in zip(made, wanted, strict=True):
        assert float((torch.from_numpy(got).float() - want).norm() / want.norm()) < row.tolerance["fp16"]


@pytest.mark.slow
@NEEDS_RTX
def test_progress_is_told_and_the_network_is_compared_with_the_component(
    job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, source, request = job("text_encoder", dataclasses.replace(REQUEST, target="sm86"))  # one target
    exporter, parts = trt_engine.TrtExporter(), []
    exporter.progress = parts.append  # type: ignore[method-assign, assignment]
    code = exporter.export(row, "main", source.configs, request, tmp_path)
    assert parts == sorted(parts) and parts[-1] == 1.0 and len(set(parts)) > 10
    assert (code.constants, code.tensors, code.others) == ({}, {}, ("text_encoder.log",))
    assert code.inputs == (TensorSpec("input_ids", (1, 77), "int64", (77, 1)),)
    assert not list(tmp_path.glob("*.onnx"))

    other = trt_engine.Graph(Path("x"), code.inputs, (TensorSpec("hidden_states", (1, 77, 64), "float16", (1,)),))
    with pytest.raises(RuntimeError, match=r"the network of text_encoder has .*; the component declares"):
        trt_engine._in_order("text_encoder", other.outputs, code.outputs)


@pytest.mark.slow
@NEEDS_RTX
def test_ctrl_c_ends_the_builder_at_its_next_step(job: Any, tmp_path: Path) -> None:
    row, source, request = job("text_encoder")
    drawn = trt_engine.graph(row, "main", source.configs, request, "text_encoder")
    told: list[float] = []

    def interrupt_once(part: float) -> None:
        if not told:
            os.kill(os.getpid(), signal.SIGINT)
        told.append(part)

    before = signal.getsignal(signal.SIGINT)
    with open(tmp_path / "log", "w") as messages, pytest.raises(KeyboardInterrupt):
        trt_build.build(drawn.file, tmp_path / "x.engine", messages, Settings("rtx", ("sm86",), True), interrupt_once)
    assert len(told) < 20  # a whole build has hundreds of steps
    assert signal.getsignal(signal.SIGINT) is before


@NEEDS_RTX
def test_what_the_parser_refuses_is_told_in_its_own_words(tmp_path: Path) -> None:
    """Two types in one Concat: what the UNet's sinusoids would be without their cast."""
    onnx = pytest.importorskip("onnx")
    half, single = (
        onnx.helper.make_tensor_value_info(name, kind, (1, 4))
        for name, kind in (("a", onnx.TensorProto.FLOAT16), ("b", onnx.TensorProto.FLOAT))
    )
    out = onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT16, (1, 8))
    node = onnx.helper.make_node("Concat", ["a", "b"], ["c"], axis=1)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", [half, single], [out]), opset_imports=[onnx.helper.make_opsetid("", 23)]
    )
    onnx.save(model, tmp_path / "unet.onnx")
    with (
        open(tmp_path / "log", "w") as messages,
        pytest.raises(ExportError, match=r"TensorRT-RTX .* read the graph of unet: .*same type") as told,
    ):
        trt_build.build(
            tmp_path / "unet.onnx",
            tmp_path / "unet.engine",
            messages,
            Settings("rtx", ("sm86",), True),
            lambda part: None,
        )
    assert "\n" not in str(told.value)
    assert "error: " in (tmp_path / "log").read_text()


# What can't be built is told before any work


def trt_command(store: Path, *words: object, **environment: str) -> Any:
    return call(*BUILD, "trt", "--model", "tiny", "--artifacts", store, *words, **environment)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--gpu", "sm90"), ("builds for sm75, sm80, sm86, sm89, sm120, sm121; sm90 was asked for", "--gpu sm90")),
        (("--gpu", "sm86,sm90"), ("sm90 was asked for", "Here: --gpu sm86", "--gpu sm90 --flavor tensorrt")),
        (("--gpu", "sm100", "--flavor", "rtx"), ("sm100 was asked for",)),
        (("--gpu", "sm86", "--flavor", "tensorrt"), ("the GPU that is present: sm86 was asked for", "--flavor rtx")),
        (("--gpu", "sm86,sm89", "--flavor", "tensorrt"), ("the one GPU that is present", "--flavor rtx")),
        (("--gpu", "sm86", "--compatibility", "same"), ("--compatibility same is for TensorRT proper", "Leave it out")),
        (("--gpu", "cpu"), ("for NVIDIA GPUs, not for a CPU", "--gpu sm86")),
        (("--gpu", "auto"), ("No GPU was found", "--gpu sm86")),
        (("--gpu", "sm999"), ("'sm999'",)),
    ],
)
def test_targets_that_cannot_be_built_here(tmp_path: Path, words: tuple[str, ...], told: tuple[str, ...]) -> None:
    one_line(trt_command(tmp_path, *words), *told)
    assert not list(tmp_path.iterdir())


@NEEDS_RTX
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"precision": "bf16"}, "in fp16 alone on sm75; bf16 was asked for. Use --precision fp16"),
        ({"precision": "fp32"}, "in fp16 alone on sm75; fp32 was asked for"),
        ({"model": "random:sdxl-base"}, "no fp32 products for sm75, and this model's VAE is upcast.*--vae fp16-fix"),
    ],
)
def test_types_that_a_target_lacks_are_told(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SdxlError, match=told):
        one(gpu="sm75,sm86", **changes)
    assert one(**changes).key.target == "sm86"
    assert one(gpu="sm75", model="random:sdxl-base", vae="fp16-fix").key.target == "sm75"


@pytest.mark.parametrize(
    ("asked", "targets", "here", "installed", "chosen"),
    [
        ("auto", ("sm86",), "", {"rtx", "tensorrt"}, "rtx"),
        ("auto", ("sm86",), "sm86", {"rtx", "tensorrt"}, "tensorrt"),
        ("auto", ("sm86",), "sm86", {"rtx"}, "rtx"),
        ("rtx", ("sm86",), "sm86", {"rtx", "tensorrt"}, "rtx"),
        ("auto", ("sm86", "sm89"), "sm86", {"rtx", "tensorrt"}, "rtx"),
        ("auto", ("sm90",), "sm90", {"rtx"}, "tensorrt"),
        ("tensorrt", ("sm90",), "sm90", set(), "tensorrt"),
    ],
)
def test_the_flavor_follows_from_what_is_asked_and_what_is_there(
    asked: str, targets: tuple[str, ...], here: str, installed: set[str], chosen: str
) -> None:
    assert trt_flavor.choose(asked, targets, here, installed) == chosen


def test_a_missing_library_is_told_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    there = machine.versions

    def without(*names: str) -> dict[str, str]:
        return {n: v for n, v in there(*names).items() if not n.startswith("tensorrt")}

    monkeypatch.setattr(machine, "versions", without)
    with pytest.raises(SdxlError, match=r"tensorrt_rtx is not installed.*pip install 'sdxl-build\[trt\]'"):
        one(gpu="sm86")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(ExportError, match=r"TensorRT-RTX is not installed.*pip install 'sdxl-build\[trt\]'"):
        trt_build.library("rtx")


def test_a_library_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(trt_build.importlib, "import_module", broken)
    with pytest.raises(ExportError, match=r"TensorRT is installed and does not start: libnvinfer"):
        trt_build.library("tensorrt")


def test_missing_graph_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_engine.importlib.util, "find_spec", lambda name: None if name == "onnx" else True)
    with pytest.raises(ExportError, match=r"makes its graphs with onnx, which is not installed.*\[trt\]"):
        trt_engine.TrtExporter().check_request(REQUEST)


@pytest.mark.parametrize(
    ("target", "precision", "told"),
    [("cpu-avx2", "fp32", "NVIDIA GPUs; cpu-avx2 was asked for"), ("sm86", "fp8", "no precision 'fp8'")],
)
def test_requests_that_are_refused(target: str, precision: str, told: str) -> None:
    with pytest.raises(ExportError, match=told):
        trt_engine.TrtExporter().check_request(Request(64, 64, 1, precision, "cpu", target, OPTIONS))


def test_a_library_that_does_not_know_a_target_says_what_it_knows() -> None:
    """A stand-in for an older TensorRT-RTX."""
    older = types.SimpleNamespace(
        __version__="1.0", ComputeCapability=types.SimpleNamespace(__members__={"NONE": 0, "SM75": 1, "SM86": 3})
    )
    assert trt_build.check_targets(older, ["sm86"]) == {"sm86": 3}
    with pytest.raises(ExportError, match=r"1\.0 builds for sm75, sm86, not for sm120\..*pip install -U tensorrt_rtx"):
        trt_build.check_targets(older, ["sm86", "sm120"])


# Memory


def test_too_little_memory_is_told_with_the_numbers() -> None:
    full = {"unet": trt_room.build_bytes(2_567_463_684, 2), "vae": trt_room.build_bytes(83_653_863, 2)}
    with pytest.raises(ExportError, match=r"TensorRT-RTX takes about 1\d\.\d GB of memory to build unet; 8\.0 GB are"):
        trt_room.at_once(full, 8 * trt_room.GB, "TensorRT-RTX")
    assert trt_room.at_once(full, 64 * trt_room.GB, "TensorRT-RTX") > 1
    assert trt_room.at_once(full, 0, "TensorRT-RTX") == 1  # nobody knows


@NEEDS_RTX
@pytest.mark.parametrize(("golden", "told"), [(True, "--no-golden"), (False, "to build unet")])
def test_a_build_without_room_begins_nothing(
    golden: bool, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from buildtool import build
    from buildtool.progress import Progress

    planned = one(model="random:sdxl-base", gpu="sm86", golden=golden, artifacts=tmp_path)
    monkeypatch.setattr(trt_room, "free_memory", lambda: 4 * trt_room.GB)
    with pytest.raises(SdxlError, match=told):
        build.build(planned, Progress(quiet=True))
    assert not list((tmp_path / "v1").glob("random*"))


def test_free_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 32000000 kB\nMemAvailable: 20000000 kB\n")
    assert trt_room.free_memory(tmp_path) == 20_480_000_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert trt_room.free_memory(tmp_path) == 20_480_000_000
    (group / "memory.max").write_text("8000000000\n")
    (group / "memory.current").write_text("5000000000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 1000000000\n")
    assert trt_room.free_memory(tmp_path) == 4_000_000_000
    assert trt_room.free_memory(tmp_path / "nothing") == 0


# Keys


def one(**changes: Any) -> Plan:
    (planned,) = plan.plan(Spec(**{"backend": "trt", "model": "tiny", "gpu": "sm86", **changes}))
    return planned


@NEEDS_RTX
def test_the_order_of_targets_is_no_ingredient_but_the_targets_are() -> None:
    assert one(gpu="sm89,sm86").key == one(gpu="sm86,sm89").key
    assert one(gpu="sm86,sm89").key.digest != one().key.digest


@NEEDS_RTX
def test_code_that_holds_weights_has_their_digest_in_its_key() -> None:
    first, second = one(model="random:tiny:1"), one(model="random:tiny:2")
    for name, of in plan.COMPONENTS.items():
        assert first.code_keys[name].options["weights"] == first.key.weights[of]
        assert first.code_keys[name].digest != second.code_keys[name].digest


@NEEDS_RTX
def test_a_second_resolution_builds_no_text_encoder_again() -> None:
    plain, other = one(), one(resolutions=((320, 256),), batch=2)
    changed = {name for name in plan.COMPONENTS if plain.code_keys[name].digest != other.code_keys[name].digest}
    assert changed == {"unet", "vae_decoder"}


@NEEDS_RTX
def test_golden_tensors_are_in_the_artifacts_key_alone() -> None:
    plain, bare = one(), one(golden=False)
    assert plain.key.digest != bare.key.digest and plain.code_keys == bare.code_keys


@NEEDS_RTX
def test_the_command_builds_the_same_key() -> None:
    from buildtool.cli import trt_command as command

    planned = one(gpu="sm86,sm120", golden=False, batch=2, resolutions=((320, 192),))
    params = command.make_context("trt", list(planned.command[2:])).params
    (again,) = plan.plan(
        Spec(backend="trt", **{k: v for k, v in params.items() if k not in ("dry_run", "as_json", "preset")})
    )
    assert again.key == planned.key


def test_flavors_are_two_rows_of_one_backend() -> None:
    row = registry.backend("trt")
    rtx, proper = row.flavored("rtx"), row.flavored("tensorrt")
    assert (rtx.tunes, proper.tunes) == (False, True)
    assert rtx.options["cuda"] == {"tf32": True, "flavor": "rtx"}
    assert proper.targets == () and "sm86" in rtx.targets


# TensorRT proper, by a stand-in: it can't be run without a GPU


class StandInConfig:
    """A stand-in for TensorRT's IBuilderConfig that remembers what was set."""

    def __init__(self) -> None:
        self.hardware_compatibility_level: Any = None
        self.flags: dict[str, bool] = {}
        self.timings: Any = None

    def set_flag(self, flag: str) -> None:
        self.flags[flag] = True

    def clear_flag(self, flag: str) -> None:
        self.flags[flag] = False

    def create_timing_cache(self, data: bytes) -> types.SimpleNamespace:
        return types.SimpleNamespace(data=data, serialize=lambda: data + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> None:
        assert not ignore_mismatch
        self.timings = cache


STAND_IN = types.SimpleNamespace(
    BuilderFlag=types.SimpleNamespace(TF32="tf32"),
    HardwareCompatibilityLevel=types.SimpleNamespace(
        NONE="none", SAME_COMPUTE_CAPABILITY="same", AMPERE_PLUS="ampere+"
    ),
)


@pytest.mark.parametrize("level", list(trt_build.LEVELS))
def test_tensorrt_proper_is_told_the_compatibility_and_its_timings(level: str, tmp_path: Path) -> None:
    place = tmp_path / "caches" / "timing"
    config = StandInConfig()
    cache = trt_build.configure(STAND_IN, config, Settings("tensorrt", ("sm86",), True, level, place))
    assert config.hardware_compatibility_level == level
    assert config.flags == {"tf32": True}
    assert config.timings is cache and cache.data == b""
    trt_build._keep(place, memoryview(cache.serialize()))
    again = trt_build.configure(STAND_IN, StandInConfig(), Settings("tensorrt", ("sm86",), False, level, place))
    assert again.data == b"+"


def test_timings_are_kept_for_each_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in RTX 3090 (24 GB)")
    options = {"flavor": "tensorrt", "tf32": True, "compatibility": "same"}
    proper = Request(64, 64, 1, "fp16", "cuda:0", "sm86", options, caches=str(tmp_path))
    settings = trt_engine._settings(proper)
    assert settings.timing_cache == tmp_path / "tensorrt-Stand-in-RTX-3090-24-GB-.timing"
    assert (settings.targets, settings.compatibility) == (("sm86",), "same")
    assert trt_engine._settings(REQUEST).timing_cache is None


def test_fp32_without_tf32_is_asked_for() -> None:
    config = StandInConfig()
    trt_build.configure(STAND_IN, config, Settings("tensorrt", ("sm86",), False))
    assert config.flags == {"tf32": False} and config.timings is None


def test_timings_that_cannot_be_kept_cost_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    trt_build._keep(tmp_path / "file" / "timing", memoryview(b"x"))


@pytest.mark.parametrize("streams", [True, False])
def test_the_engine_is_written_as_it_comes_or_at_once(streams: bool, tmp_path: Path) -> None:
    """Stand-ins for a builder that writes to a stream and for an older one."""

    class Streaming:
        def build_serialized_network_to_stream(self, network: str, config: str, writer: Any) -> bool:
            return [writer.write(piece) for piece in (b"en", b"gine")] == [2, 4]

    class Older:
        def build_serialized_network(self, network: str, config: str) -> bytes:
            return b"engine"

    class Failing:
        def build_serialized_network(self, network: str, config: str) -> None:
            return None

    trt = types.SimpleNamespace(IStreamWriter=type("IStreamWriter", (), {"__init__": lambda self: None}))
    with open(tmp_path / "x.engine", "wb") as file:
        assert trt_build._write(trt, Streaming() if streams else Older(), "network", "config", file)
        assert not trt_build._write(trt, Failing(), "network", "config", file)
    assert (tmp_path / "x.engine").read_bytes() == b"engine"


def test_a_workers_progress_reaches_the_builders_bars(tmp_path: Path) -> None:
    from buildtool import compiler
    from buildtool.progress import Progress
    from exporters import worker

    told = worker._Progress(tmp_path / "unet.cfg.progress")
    told(0.25)
    told(0.5)  # too soon after the first to be written
    shown = Progress(quiet=True)
    bars: dict[int, float] = {}
    shown._bars = types.SimpleNamespace(  # a stand-in for rich's
        add_task=lambda name, total: int(bars.setdefault(0, 0.0)),
        update=lambda task, completed: bars.update({task: completed}),
        remove_task=bars.pop,
    )
    pool = compiler.Pool(shown)
    pool._scratch = tmp_path
    pool._show("unet.cfg")
    pool._show("unet.nocfg")  # which says nothing yet
    assert bars == {0: 0.25}
    shown.beside("unet.cfg", 1.0)
    assert bars == {}


def test_the_part_that_is_done_never_goes_back() -> None:
    phases, told = Phases(), []
    phases.start("build", None, 2)
    phases.start("optimize", "build", 4)
    told += [phases.step("optimize", i) for i in range(4)]
    told += [phases.finish("optimize"), phases.step("build", 0)]
    phases.start("serialize", "build", 2)
    told += [phases.step("serialize", 0), phases.step("unknown", 3), phases.finish("serialize")]
    told += [phases.step("build", 1), phases.finish("build")]
    assert told == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.75, 0.75, 0.75, 1.0, 1.0]
