"""The measuring programs on the GPU, on tiny: that they run there, not what they find."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(program: str, told: Path, *words: str) -> dict[str, Any]:
    line = [sys.executable, str(FOLDER / program), *words, "--json", str(told)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def test_step(artifacts: dict[str, Path], tmp_path: Path) -> None:
    words = ["--component", "all", "--peer", "eager", "--peer", "eager-nchw", "--calls", "10", "--rounds", "2"]
    rows = run("step.py", tmp_path / "told.json", str(artifacts["fp16"]), *words)["rows"]
    assert len(rows) == 13
    for row in rows:
        assert row["milliseconds"]["count"] >= 10 and row["milliseconds"]["least"] > 0
        assert row["error"] and max(row["error"].values()) < 1e-2, row


def test_cold_start(artifacts: dict[str, Path], tmp_path: Path) -> None:
    words = ["--runs", "1", "--warmup", "0", "--steps", "2", "--peer", "diffusers", "--peer-runs", "1"]
    found = run("cold_start.py", tmp_path / "told.json", str(artifacts["fp16"]), *words)
    (ours,), (theirs,) = found["runs"]["ours"], found["runs"]["diffusers"]
    assert 0 < ours["saved"] <= ours["ended"] and theirs["saved"] > 0
    assert any(span["name"].startswith("weights") for span in ours["spans"])


def test_memory(artifacts: dict[str, Path], tmp_path: Path) -> None:
    both = [str(artifacts["fp16"]), str(artifacts["wide"])]
    found = run("memory.py", tmp_path / "told.json", *both, "--steps", "2")
    assert found["weights_grown"] == 0
    assert all(peak["driver"] > 100e6 and peak["torch_allocated"] > 0 for peak in found["peaks"])
    marks = found["engines"][1]["marks"]
    assert marks[0]["driver"] > 100e6  # a context
    assert marks[-1]["weights"] == found["engines"][0]["marks"][-1]["weights"] > 0


def test_picture(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """Two settings of two artifacts beside eager, and a peer whose time is up before it has drawn anything."""
    words = ["--steps", "10", "--runs", "4", "--guidance-until", "1", "--guidance-until", "0.5", "--peer", "eager"]
    both = [str(artifacts["fp16"]), str(artifacts["bf16"])]
    limited = ["--peer", "max-autotune", "--peer-limit", "5"]
    found = run("picture.py", tmp_path / "told.json", *both, *words, *limited)
    assert found["complete"] and len(found["rows"]) == 8
    fp16, _, bf16, _, eager, _, *cut = found["rows"]
    for row in (fp16, bf16, eager):
        assert row["failure"] == "" and row["seconds"]["count"] == 4 and row["parts"]["denoise"][0] > 0
    assert fp16["latents_error"] < 3 * eager["latents_error"] + 1e-3  # no more wrong than eager
    assert fp16["psnr"] > 30
    assert all(row["failure"] for row in cut)


def test_techniques(store_root: Path, tmp_path: Path) -> None:
    names = ("model-offload", "staged", "vae-tiny", "fastest", "refiner", "lora", "eager")
    words = ["--model", "tiny", "--steps", "5", "--runs", "1", "--prompts", "2", "--artifacts", str(store_root)]
    chosen = [word for name in names for word in ("--only", name)]
    rows = {row["technique"]: row for row in run("techniques.py", tmp_path / "told.json", *words, *chosen)["rows"]}
    assert rows.keys() == {"baseline", *names} and not [row["failure"] for row in rows.values() if "failure" in row]
    for row in rows.values():
        assert row["peak_memory_bytes"]["driver"] > row["peak_memory_bytes"]["cuda"] > 0
        assert row["right"] is not None
    assert rows["staged"]["psnr"] is None and rows["staged"]["ssim"] == 1 and rows["fastest"]["psnr"] < 60


def test_throughput(artifacts: dict[str, Path], tmp_path: Path) -> None:
    words = ["--images", "3", "--steps", "4", "--runs", "2", "--peer", "eager"]
    ours, eager = run("throughput.py", tmp_path / "told.json", str(artifacts["fp16"]), *words)["rows"]
    assert ours["pictures_per_second"] > 0 and eager["failure"] == ""
    assert ours["latents_error"] < 3 * eager["latents_error"] + 1e-3
