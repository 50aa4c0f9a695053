"""Real builds: hits, second checkpoints, two at once, and SIGKILL at any moment."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool.store import manifest
from buildtool.store.store import Store, verify_files
from tests import micro
from tests.conftest import Builder

pytestmark = pytest.mark.slow

BUILD = [sys.executable, "-m", "buildtool.cli", "torch", "--gpu", "cpu"]


def latents(pipeline: Any, **arguments: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        "a red circle", num_inference_steps=4, output_type="latent", generator=generator, **arguments
    ).images


def eager(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_hit_takes_under_half_a_second_and_imports_no_torch(tiny_artifact: Path, store_root: Path) -> None:
    script = (
        "import sys, time; start = time.perf_counter(); from buildtool.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "print(time.perf_counter() - start, 'torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    words = ["torch", "--model", "tiny", "--gpu", "cpu", "--artifacts", str(store_root)]
    done = [subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True) for _ in range(3)]
    assert [d.stdout.strip() for d in done] == [str(tiny_artifact)] * 3, done[0].stderr
    told = [d.stderr.split() for d in done]
    assert {t[1] for t in told} == {"False"}
    assert min(float(t[0]) for t in told) < 0.5


def test_a_second_checkpoint_compiles_nothing_and_equals_its_own_eager(
    sdxl_build: Builder, micro_artifact: Path, tmp_path: Path
) -> None:
    other = micro.write(tmp_path / "other-micro", seed=7)
    built = sdxl_build(str(other))
    assert built["compiled"] == [] and not built["hit"]
    mine, first = latents(runtimes.load(built["path"])), latents(runtimes.load(micro_artifact))
    reference = latents(eager(other))
    assert float((mine - reference).abs().max() / reference.std()) < 1e-4
    assert float((mine - first).abs().max() / reference.std()) > 0.01
    for component in ("unet", "vae_decoder", "text_encoder", "text_encoder_2"):
        one, two = (manifest.read(p).components[component] for p in (built["path"], micro_artifact))
        assert one.code_key == two.code_key
        for name in one.variants:
            assert (built["path"] / one.variants[name].file).samefile(micro_artifact / two.variants[name].file)


def test_a_second_resolution_adds_no_weights_and_no_text_encoder(
    micro_artifact: Path, micro_wide_artifact: Path
) -> None:
    one, two = (manifest.read(p) for p in (micro_artifact, micro_wide_artifact))
    for name in one.components:
        assert (micro_artifact / one.components[name].weights).samefile(
            micro_wide_artifact / two.components[name].weights
        )
    for name in ("text_encoder", "text_encoder_2"):
        assert one.components[name].code_key == two.components[name].code_key
    assert one.components["unet"].code_key != two.components["unet"].code_key


def test_the_manifest_says_what_was_checked(tiny_artifact: Path) -> None:
    read = manifest.read(tiny_artifact)
    for component in read.components.values():
        for variant in component.variants.values():
            assert variant.check.status == "passed"
            assert variant.check.error.keys() == {o.name for o in variant.outputs}
            assert all(0 <= e <= variant.check.tolerance == 1e-4 for e in variant.check.error.values())
    assert read.built_with["torch"] == torch.__version__
    assert read.command[:2] == ("sdxl-build", "torch")


def test_dry_run_says_why_it_would_be_a_miss(tiny_artifact: Path, store_root: Path) -> None:
    command = [*BUILD, "--model", "tiny", "--artifacts", str(store_root), "--resolution", "512x256", "--dry-run"]
    (told,) = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True).stdout)["plans"]
    assert (not told["hit"] and told["differs"] == {"height": [256, 256], "width": [512, 256]}) or told["differs"] == {
        "width": [512, 256]
    }
    assert told["compiles"] == ["unet", "vae_decoder"]
    text = subprocess.run(command, capture_output=True, text=True).stdout
    assert "width: 256 there, 512 asked for" in text and "unet, vae_decoder" in text


def test_a_copy_without_the_store_runs(micro_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "an artifact"
    shutil.copytree(micro_artifact, copy)
    assert verify_files(copy) == []
    assert torch.equal(latents(runtimes.load(copy)), latents(runtimes.load(micro_artifact)))


def test_verify_finds_a_changed_byte_in_any_file(micro_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(micro_artifact, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file())
    assert len(files) > 10
    for path in files:
        path.chmod(0o644)
        data = path.read_bytes()
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert verify_files(copy), path.name
        path.write_bytes(data)
    assert verify_files(copy) == []


def test_verify_runs_the_golden_tensors(micro_artifact: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "buildtool.cli", "verify", str(micro_artifact), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["artifacts"]
    assert result["checked"] and result["passed"] and set(result["variants"]) == {
        "text_encoder.main", "text_encoder_2.main", "unet.cfg", "unet.nocfg", "vae_decoder.main",
    }  # fmt: skip


def test_a_build_whose_numbers_are_wrong_is_not_kept(
    micro_model: Path, micro_artifact: Path, store_root: Path, tmp_path: Path
) -> None:
    """Code of another meaning under the right key (a stand-in for a miscompilation) fails the check."""
    root = tmp_path / "store"
    for component in manifest.read(micro_artifact).components.values():
        shutil.copytree(store_root / "v1/code" / component.code_key, root / "v1/code" / component.code_key)
    store, digest = Store(root), manifest.read(micro_artifact).components["unet"].code_key
    record = store.code_record(digest)
    meta = json.loads(json.dumps(record.meta))
    assert meta["tensors"]["model.conv_in.bias"]["sources"] == ["conv_in.bias"]
    meta["tensors"]["model.conv_in.bias"]["sources"] = ["down_blocks.0.resnets.0.norm1.bias"]
    with store.stage() as stage:
        for name in record.files:
            shutil.copy(root / "v1/code" / digest / name, stage / name)
        store.commit_code(stage, digest, meta)
    command = [*BUILD, "--model", str(micro_model), "--artifacts", str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("Error: unet.") and "from fp32 eager; 1e-04 is allowed" in line
    assert not list((root / "v1").glob("micro/*/*"))


def test_builds_killed_at_any_moment_leave_no_broken_hit_and_two_at_once_compile_once(
    micro_artifact: Path, store_root: Path, tmp_path: Path
) -> None:
    """Two real builds are killed, one in the middle and one when some of its code is there; then two at once succeed,
    on one's work. The UNet's code, which takes longest, is there from the start."""
    folder = micro.write(tmp_path / "model")
    root = tmp_path / "store"
    code = Path("v1/code")
    unet, text = (code / manifest.read(micro_artifact).components[name].code_key for name in ("unet", "text_encoder"))
    shutil.copytree(store_root / unet, root / unet)
    command = [*BUILD, "--model", str(folder), "--artifacts", str(root), "--json"]
    for some_code in (False, True):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        if some_code:
            deadline = time.monotonic() + 120
            while len(list((root / code).iterdir())) < 2 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
        else:
            time.sleep(random.Random(3).uniform(3.0, 9.0))
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        for found, _ in Store(root).artifacts():
            assert verify_files(found) == []
    assert len(list((root / code).iterdir())) >= 2, "the second one was killed before it had any code"
    if (root / text).exists():  # what is compiled side by side may be there all at once: something is left to do
        shutil.rmtree(root / text)
    deadline = time.monotonic() + 30
    while (left := _workers(root)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, "compilers outlive their killed builder"
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    one, two = (json.loads(out)["artifacts"][0] for out, _ in told)
    assert one["path"] == two["path"]
    assert [] in (one["compiled"], two["compiled"]) and one["compiled"] != two["compiled"]
    assert sum("waiting" in err for _, err in told) == 1
    assert verify_files(Path(one["path"])) == []
    assert not list((root / "v1" / "staging").iterdir())


def _workers(root: Path) -> list[str]:
    """Command lines of processes that still work below a store."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if "exporters." in line and str(root) in line:
                found.append(line)
    return found
