"""What is in memory when: freed components are gone, each is loaded once a run, pictures stay the same bit by bit."""

import json
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

import runtimes
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.lora import Lora
from runtimes import gpu_upload, memory, weights
from runtimes.cuda_graph import GraphPool
from runtimes.jobs import Job
from runtimes.names import Names
from runtimes.pipeline import Pipeline
from runtimes.session import Planner, Session
from tests.runtimes.stand_in import StandInPipeline, stand_in_artifact, stand_in_manifest

MODES = ("staged", "model-offload")


def other(manifest: Any, target: str, loader: str) -> Any:
    """A manifest for another target, run by another loader."""
    components = {n: msgspec.structs.replace(c, loader=loader) for n, c in manifest.components.items()}
    return msgspec.structs.replace(
        manifest, key=msgspec.structs.replace(manifest.key, target=target), components=components
    )


def test_modes_that_cannot_be_are_refused_by_name() -> None:
    here = stand_in_manifest()
    with pytest.raises(SdxlError, match="no memory mode 'none'") as caught:
        memory.check("none", [here])
    assert "resident, staged, model-offload, sequential" in caught.value.hint
    with pytest.raises(SdxlError, match="the artifact was built for cpu-avx2"):
        memory.check("model-offload", [here])
    with pytest.raises(SdxlError, match="trt_engine's engines hold theirs") as caught:
        memory.check("model-offload", [other(here, "sm90", "trt_engine")])
    assert "--memory staged" in caught.value.hint
    memory.check("model-offload", [other(here, "sm90", "torch_package")])
    cut = stand_in_manifest(options={"segments": 2})
    with pytest.raises(SdxlError, match="the artifact was built for cpu-avx2"):
        memory.check("sequential", [cut])
    with pytest.raises(SdxlError, match="the artifact's is in one piece") as caught:
        memory.check("sequential", [other(cut, "sm90", "torch_package"), other(here, "sm90", "torch_package")])
    assert "sdxl-build torch --model tiny" in caught.value.hint and caught.value.hint.endswith("--segments 8")
    with pytest.raises(SdxlError, match="trt_engine's engines hold theirs") as caught:
        memory.check("sequential", [other(cut, "sm90", "trt_engine")])
    assert caught.value.hint.endswith("sdxl-build torch --segments 8")
    memory.check("sequential", [other(cut, "sm90", "torch_package")])
    for mode in ("resident", "staged"):
        memory.check(mode, [here, other(here, "sm90", "trt_engine")])


def test_the_command_line_refuses_before_anything_is_loaded(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from runtimes import cli

    engine = str(stand_in_artifact(tmp_path / "artifact"))
    words = ["--engine", engine, "--prompt", "a", "--memory"]
    for extra, said in ((["model-offload"], "built for cpu-avx2"), (["staged", "--lora", "a.st"], "--lora FILE")):
        done = CliRunner().invoke(cli.command, [*words, *extra])
        assert isinstance(done.exception, SdxlError) and said in str(done.exception)
    assert CliRunner().invoke(cli.command, [*words, "most"]).exit_code == 2


def test_only_what_comes_first_is_uploaded_ahead(tmp_path: Path) -> None:
    names = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
    here = other(stand_in_manifest(), "sm90", "torch_package")
    unet = here.components["unet"]
    here = msgspec.structs.replace(
        here,
        components={n: msgspec.structs.replace(unet, weights=n) for n in names},
        files={n: manifests.FileEntry(size=1, sha256=n) for n in names},
    )
    ahead = {m: [*gpu_upload.weights_files([(tmp_path, here)], memory.ahead(m))] for m in memory.MODES}
    assert ahead == {"resident": [*names], "staged": [*names[:2]], "model-offload": [], "sequential": []}


class StandInStages(StandInPipeline):
    """A stand-in that can be called stage by stage; it remembers in what order it was."""

    memory = "staged"

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(folders)
        self.order: list[str] = []

    def encode_prompt(self, prompt: list[str], **_: Any) -> tuple[torch.Tensor, ...]:
        self.order.append(f"encode {prompt[0]}")
        return tuple(torch.zeros(len(prompt)) for _ in range(4))

    def encode_start_image(self, image: Any, count: int, dtype: torch.dtype, generator: Any, **_: Any) -> torch.Tensor:
        self.order.append("encode image")
        return torch.zeros(count, dtype=dtype)

    def __call__(self, **arguments: Any) -> Any:
        assert arguments["output_type"] == "latent" and "prompt" not in arguments
        assert not isinstance(arguments.get("image"), Image.Image)
        self.order.append(f"denoise {arguments['generator'][0].initial_seed()}")
        made = super().__call__(prompt=arguments["prompt_embeds"], **arguments)
        return SimpleNamespace(images=made.images)

    def decode(self, latents: Any) -> Any:
        self.order.append("decode")
        self.timings = {"decode": 0.2}
        return latents


def test_a_run_takes_one_stage_after_the_other(tmp_path: Path) -> None:
    start = tmp_path / "start.png"
    Image.new("RGB", (8, 8)).save(start)
    engine = stand_in_artifact(tmp_path / "artifact", encoder=True)
    options = Job(prompt="", seed=1, steps=3, guidance=5.0, guidance_until=1.0, num_images=1, strength=0.5)
    planner = Planner([manifests.read(engine)], options, Names(str(tmp_path / "out") + "/"), "staged")
    pipeline = StandInStages([engine])
    session = Session(pipeline, lambda title: nullcontext())
    pictures = planner.plan([Job(prompt="a"), Job(prompt="b", image=str(start)), Job(prompt="c", steps=2)])
    for picture in session.render(pictures):
        assert picture.path.is_file()
    stages = [
        *("encode a", "encode b", "encode c", "encode image"),
        *("denoise 1", "denoise 2", "denoise 3", "decode", "decode", "decode"),
    ]
    assert pipeline.order == stages
    assert session.report()["unet_steps"]["full"] == 3 + 3 + 2


@pytest.mark.parametrize(("graphs", "gone"), [(0, True), (1, False)])
def test_a_pool_with_graphs_in_it_stays(graphs: int, gone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch aborts the process if a pool goes first."""
    device = torch.device("cuda", 7)
    full = SimpleNamespace(use_count=lambda: 1 + graphs)
    stand_in: Any = SimpleNamespace(memory=full)
    monkeypatch.setitem(GraphPool._pools, device, stand_in)
    monkeypatch.setattr(torch.cuda, "MemPool", lambda: "a new one")
    GraphPool.empty(device)
    assert stand_in.memory == ("a new one" if gone else full)
    GraphPool.empty(torch.device("cuda", 8))  # none was made


# From here on with engines.


@pytest.fixture(params=["torch", "onnx"])
def artifact(request: pytest.FixtureRequest) -> Path:
    """The micro model with the VAE's encoder."""
    names = {"torch": "micro_encoder_artifact", "onnx": "micro_encoder_onnx_artifact"}
    path: Path = request.getfixturevalue(names[request.param])
    return path


@pytest.fixture
def offload_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a GPU: copies from host memory are copies all the same."""
    monkeypatch.setattr(memory, "check", lambda mode, found: None)


ALL = ["text_encoder.main", "text_encoder_2.main", "vae_encoder.main", "unet.cfg", "vae_decoder.main"]


def call(pipeline: Pipeline, **arguments: Any) -> torch.Tensor:
    made: torch.Tensor = pipeline(
        ["a", "b"],
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(i) for i in (1, 2)],
        output_type="pt",
        **arguments,
    ).images
    return made


@pytest.mark.slow
def test_what_is_freed_is_gone(artifact: Path) -> None:
    pipeline = runtimes.load(artifact, memory="staged")
    there = pipeline.artifacts[0]
    engines = [weakref.ref(there.engine(name)) for name in memory.TEXT_ENCODERS]
    data = [weakref.ref(data) for data, _ in there._weights._files.values()]
    constants = [weakref.ref(t) for e in engines for t in getattr(e(), "constants", {}).values()]
    assert all(ref() is not None for ref in (*engines, *data, *constants))
    embeds = pipeline.encode_prompt("a")
    assert all(ref() is not None for ref in engines)  # the stage that needs them keeps them
    made = pipeline(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        pooled_prompt_embeds=embeds[2],
        negative_pooled_prompt_embeds=embeds[3],
        num_inference_steps=1,
        output_type="latent",
    ).images
    assert not any(ref() is not None for ref in (*engines, *data, *constants))
    unet = weakref.ref(there.engine("unet", "cfg"))
    data = [weakref.ref(data) for data, _ in there._weights._files.values()]
    pipeline.decode(made)
    assert unet() is None and not any(ref() is not None for ref in data)
    assert {digests[0] for digests in there._engines} == {"vae_decoder"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_calls_draw_the_same(artifact: Path, mode: str, offload_on_the_cpu: None) -> None:
    """Text to image, then image to image: what was freed is loaded again."""
    resident, ours = runtimes.load(artifact), runtimes.load(artifact, memory=mode)
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    for arguments in ({"guidance_until": 0.4}, {"image": image, "strength": 0.6}):
        assert torch.equal(call(ours, **arguments), call(resident, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_loads_each_component_once(
    artifact: Path, mode: str, tmp_path: Path, offload_on_the_cpu: None, opened: list[tuple[str, str]]
) -> None:
    """Also where its pictures are several calls; the next run loads them again, and pictures are the resident ones."""
    start = tmp_path / "start.png"
    Image.effect_noise((64, 64), 80).convert("RGB").save(start)
    asked = [Job(prompt="a"), Job(prompt="b", image=str(start)), Job(prompt="c", steps=3, negative_prompt="d")]
    options = Job(prompt="", seed=1, steps=2, guidance=5.0, guidance_until=1.0, num_images=2, strength=0.6)
    drawn = {}
    for each in ("resident", mode):
        planner = Planner([manifests.read(artifact)], options, Names(str(tmp_path / each) + "/"), each)
        session = Session(runtimes.load(artifact, memory=each), lambda title: nullcontext())
        opened.clear()
        drawn[each] = [p.path.read_bytes() for p in session.render(planner.plan(asked))]
        assert sorted(name for _, name in opened) == sorted(ALL)
        drawn[each] += [p.path.read_bytes() for p in session.render(planner.plan([Job(prompt="e")]))]
        again = [name for name in ALL if not name.startswith("vae_encoder")]
        assert sorted(name for _, name in opened) == sorted(ALL if each == "resident" else [*ALL, *again])
        assert session.seconds.keys() >= {"load", "encode", "denoise", "decode", "save"}
    assert drawn[mode] == drawn["resident"] and len(drawn[mode]) == 8


@pytest.mark.slow
def test_offloaded_weights_are_read_once(
    micro_artifact: Path, offload_on_the_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    init = weights.HostFile.__init__

    def counted(self: weights.HostFile, path: Path, size: int, pin: bool) -> None:
        read.append(path.name)
        init(self, path, size, pin)

    monkeypatch.setattr(weights.HostFile, "__init__", counted)
    ours = runtimes.load(micro_artifact, memory="model-offload")
    first = call(ours)
    assert sorted(read) == sorted({Path(c.weights).name for c in ours.artifacts[0].manifest.components.values()})
    before, held = len(read), ours.artifacts[0]._weights
    assert torch.equal(call(ours), first) and len(read) == before
    (digest,) = held._files  # the last stage's, on the device; the rest waits in host memory
    assert len(held._host) == before and held._files[digest][0].data_ptr() != held._host[digest].data.data_ptr()


@pytest.mark.slow
def test_code_is_loaded_once(micro_artifact: Path) -> None:
    """Torch never unloads it. Two pipelines at a time have a copy each, or one would run on the other's weights."""

    def loaded() -> int:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return len({line.split()[-1] for line in lines if ".so" in line and "/tmp" in line})

    ours = runtimes.load(micro_artifact, memory="staged")
    first, before = call(ours), loaded()
    assert torch.equal(call(ours), first) and loaded() == before
    theirs = runtimes.load(micro_artifact)
    unets = [pipeline.artifacts[0].engine("unet", "cfg") for pipeline in (ours, theirs)]
    assert unets[0]._package is not unets[1]._package  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_lora_needs_weights_that_stay(micro_artifact: Path) -> None:
    ours = runtimes.load(micro_artifact, memory="staged")
    ours.set_loras([])
    with pytest.raises(SdxlError, match="stay in memory") as caught:
        ours.set_loras([Lora(Path("a.safetensors"), 1.0)])
    assert "sdxl-build torch --lora" in caught.value.hint


@pytest.mark.slow
def test_lines_of_stdin_are_runs_of_their_own(micro_artifact: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    words = [
        "--engine",
        str(micro_artifact),
        "--prompts",
        "-",
        "--steps",
        "1",
        "--seed",
        "1",
        "--memory",
        "staged",
        "-v",
    ]
    lines = "".join(json.dumps({"prompt": p, "out": str(tmp_path / f"{p}.png")}) + "\n" for p in "ab")
    done = subprocess.run(
        [sys.executable, "-m", "runtimes.cli", *words], input=lines, capture_output=True, text=True, check=True
    )
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 2]
    assert "each line" in done.stderr and done.stderr.count("open unet.cfg") == 2
