"""The onediff backend's two processes, with a stand-in of OneDiff: protocol, artifact, errors. No GPU, no OneDiff."""

import ast
import json
import os
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import runtimes
from buildtool.store import interpreter, manifest
from buildtool.store.errors import SdxlError
from exporters import onediff_worker, sdxl
from exporters.base import ExportError, Request
from exporters.onediff_graph import OnediffExporter
from runtimes.onediff_graph import OnediffEngine, Worker
from tests import standin_interpreter

CPU = torch.device("cpu")


def test_the_worker_is_one_file_for_an_old_python() -> None:
    """Nothing of ours and no newer syntax: OneDiff's environments have Python 3.8 to 3.12."""
    tree = ast.parse(interpreter.WORKER.read_text(), feature_version=(3, 8))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & {"buildtool", "exporters", "runtimes", "msgspec"}


@pytest.fixture
def worker(standin_onediff: Path) -> Iterator[Worker]:
    made = Worker(str(standin_onediff), CPU)
    yield made
    made.close()


@pytest.mark.slow
def test_a_build_with_a_stand_in_of_nexfort_is_checked_and_makes_pictures(micro_standin_onediff_artifact: Path) -> None:
    read = manifest.read(micro_standin_onediff_artifact)
    forms = {f"{c}.{v}": form for c, of in read.components.items() for v, form in of.variants.items()}
    assert {form.check.status for form in forms.values()} == {"passed"}
    assert forms["unet.cfg"].file == "unet.cfg.nexfort"
    with zipfile.ZipFile(micro_standin_onediff_artifact / "unet.cfg.nexfort") as packed:
        assert any(name.startswith("caches/compiledgraph/") for name in packed.namelist())
    pipeline = runtimes.load(micro_standin_onediff_artifact)
    first, again = (
        pipeline("a circle", num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="np").images
        for _ in range(2)
    )
    assert first.shape == (1, 64, 64, 3) and (first == again).all()


@pytest.mark.slow
def test_code_whose_caches_do_not_serve_is_refused_and_a_dead_worker_told(
    micro_standin_onediff_artifact: Path, worker: Worker, tmp_path: Path
) -> None:
    """A stand-in compiles where it finds no cache entry, as nexfort does."""
    folder = tmp_path / "artifact"
    shutil.copytree(micro_standin_onediff_artifact, folder)
    component = manifest.read(folder).components["unet"]
    form = component.variants["nocfg"]
    good = folder / form.file
    with zipfile.ZipFile(good) as packed, zipfile.ZipFile(tmp_path / "without", "w") as other:
        other.writestr("code.json", packed.read("code.json"))
    shutil.copy(tmp_path / "without", folder / "bad.nexfort")
    with pytest.raises(SdxlError, match=r"did not load as it was built: OneDiff compiled it anew \(entry\)"):
        OnediffEngine(folder / "bad.nexfort", "unet.nocfg", component, form, CPU, worker)
    engine = OnediffEngine(good, "unet.nocfg", component, form, CPU, worker)
    inputs = {s.name: torch.zeros(s.shape, dtype=getattr(torch, s.dtype)) for s in form.inputs}
    assert torch.isfinite(engine(**inputs)[0]).all()
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(SdxlError, match="died of signal 9"):
        engine(**inputs)


@pytest.mark.slow
def test_an_artifact_runs_with_the_versions_that_built_it(
    micro_standin_onediff_artifact: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newer = standin_interpreter.write(tmp_path, {"onediff": "1.2.0+standin", "nexfort": "0.2+standin"})
    monkeypatch.setenv(interpreter.VARIABLE, str(newer))
    with pytest.raises(SdxlError, match=r"was built with nexfort 0.1.dev330\+standin; .* has 0.2\+standin"):
        runtimes.load(micro_standin_onediff_artifact)
    monkeypatch.delenv(interpreter.VARIABLE)
    with pytest.raises(SdxlError, match="none is named"):
        runtimes.load(micro_standin_onediff_artifact)


def test_tritons_lists_of_files_lead_to_where_they_were_unpacked(tmp_path: Path) -> None:
    """Triton 3.0 names a kernel's files by absolute paths in the build's folder, and compiles what it finds none of."""
    name, listed = "caches/triton/AB/__grp__kernel.json", tmp_path / "here" / "__grp__kernel.json"
    with zipfile.ZipFile(tmp_path / "packed", "w") as packed:
        packed.writestr(name, json.dumps({"child_paths": {"kernel.cubin": "/gone/triton/AB/kernel.cubin"}}))
        onediff_worker._unpack(packed, name, str(listed))
    assert json.loads(listed.read_text()) == {"child_paths": {"kernel.cubin": str(listed.parent / "kernel.cubin")}}


def request(compiler: str, device: str = "cpu") -> Request:
    return Request(64, 64, 1, "fp32", device, "cpu-avx2", {"compiler": compiler, "mode": "cache-all"})


@pytest.mark.slow
def test_no_gpu_is_told_in_one_line(micro_model: Path, standin_onediff: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    configs = {name: json.loads((micro_model / name / "config.json").read_text()) for name in ("unet", "vae")}
    with pytest.raises(ExportError, match="sees no GPU"):
        OnediffExporter().export(sdxl.component("unet"), "cfg", configs, request("nexfort", "cuda:0"), tmp_path)
    with pytest.raises(ExportError, match=r"oneflow is for NVIDIA GPUs\. On a CPU: --compiler nexfort"):
        OnediffExporter().check_request(request("oneflow"))


@pytest.mark.slow
def test_a_graph_of_a_stand_in_of_oneflow_is_saved_and_loaded(
    micro_standin_onediff_artifact: Path, worker: Worker, tmp_path: Path
) -> None:
    """The VAE's decoder through ``oneflow_compile``, ``save_graph`` and ``load_graph`` as the stand-in has them."""
    artifact = tmp_path / "artifact"
    shutil.copytree(micro_standin_onediff_artifact, artifact)
    component = manifest.read(artifact).components["vae_decoder"]
    form = component.variants["main"]
    with zipfile.ZipFile(artifact / form.file) as packed:
        code = {**json.loads(packed.read("code.json")), "compiler": "oneflow"}
    job = {"code": code, "device": "cpu", "file": str(artifact / "graph.oneflow"), "result": str(tmp_path / "result")}
    (tmp_path / "job").write_text(json.dumps(job))
    subprocess.run([worker.python, str(interpreter.WORKER), "compile", str(tmp_path / "job")], check=True)
    with zipfile.ZipFile(artifact / "graph.oneflow") as packed:
        assert packed.namelist() == ["code.json", "graph"]
    engine = OnediffEngine(artifact / "graph.oneflow", "vae_decoder.main", component, form, CPU, worker)
    latents = torch.randn(form.inputs[0].shape, generator=torch.Generator().manual_seed(0))
    wanted = runtimes.load(micro_standin_onediff_artifact).artifacts[0].engine("vae_decoder")(latents=latents)[0]
    assert torch.allclose(engine(latents=latents)[0], wanted, atol=1e-6)
