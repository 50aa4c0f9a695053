"""``sdxl-run`` on the GPU: a picture from a fresh process, and errors of one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import runtimes
from tests.gpu.conftest import Run
from tests.gpu.helpers import only_line

pytestmark = pytest.mark.gpu

PROMPT = "a large red circle on the left"


def words(artifact: Path, out: Path, *more: str) -> list[str]:
    settings = ["--prompt", PROMPT, "--steps", "4", "--seed", "1", "--quiet", *more]
    return ["--engine", str(artifact), "--out", str(out), *settings]


def test_a_fresh_process_makes_the_picture(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    done = command("runtimes.cli", *words(artifacts["fp16"], out, "--json"))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["peak_memory_bytes"]["cuda"] > 0
    spans = {span["name"]: span for span in told["timeline"]}
    assert {"import torch", "denoise", "decode", "save"} <= spans.keys()
    assert all(0 <= span["start"] <= span["end"] for span in told["timeline"])
    pipeline = runtimes.load(artifacts["fp16"])
    (here,) = pipeline(PROMPT, num_inference_steps=4, generator=torch.Generator().manual_seed(1)).images
    with Image.open(out) as made:
        difference = numpy.asarray(made.convert("RGB"), dtype=int) - numpy.asarray(here, dtype=int)
    assert int(abs(difference).max()) <= 1


def test_a_picture_alone_is_that_of_a_run_that_records_graphs(
    artifacts: dict[str, Path], command: Run, tmp_path: Path
) -> None:
    """Bit for bit; one that comes alone is computed without."""
    pixels, steps = [], []
    for count in (1, 2):
        out = tmp_path / f"{count}-{{seed}}.png"
        done = command("runtimes.cli", *words(artifacts["fp16"], out, "--json", "--num-images", str(count)))
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert len(told["images"]) == count
        steps.append({span["name"].partition(" ")[0] for span in told["timeline"]})
        with Image.open(tmp_path / f"{count}-1.png") as made:
            pixels.append(numpy.asarray(made.convert("RGB")))
    assert "record" not in steps[0] and "first" in steps[0] and "record" in steps[1]
    assert numpy.array_equal(*pixels)


def test_two_resolutions_in_one_run(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    sizes = [(256, 256), (320, 192), (256, 256)]
    jobs.write_text("\n".join(json.dumps({"prompt": PROMPT, "width": w, "height": h}) for w, h in sizes))
    engines = ["--engine", str(artifacts["fp16"]), "--engine", str(artifacts["wide"])]
    more = ["--prompts", str(jobs), "--steps", "2", "--seed", "1", "--out", f"{tmp_path}/{{index}}.png", "--json"]
    done = command("runtimes.cli", *engines, *more, "--guidance-until", "0.5")
    assert done.returncode == 0, done.stderr
    made = [Image.open(image["path"]).size for image in json.loads(done.stdout)["images"]]
    assert made == sizes


def test_verbose_shows_the_timeline(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    given = [word for word in words(artifacts["fp16"], tmp_path / "a.png", "-v") if word != "--quiet"]
    done = command("runtimes.cli", *given)
    assert done.returncode == 0, done.stderr
    assert "import torch" in done.stderr and "denoise" in done.stderr
    assert "recorded again" not in done.stderr  # each graph is recorded once


def test_nothing_is_imported_that_a_run_does_not_use(artifacts: dict[str, Path], tmp_path: Path) -> None:
    code = (
        "import sys; from runtimes.cli import command\n"
        "command.main(sys.argv[1:], standalone_mode=False)\n"
        "print(*[m for m in ('diffusers', 'transformers', 'torch._inductor', 'torch._dynamo', 'triton') "
        "if m in sys.modules], file=sys.stderr)"
    )
    line = [sys.executable, "-c", code, *words(artifacts["fp16"], tmp_path / "a.png")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


def test_a_gpu_that_is_not_there(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    line = only_line(command("runtimes.cli", *words(artifacts["fp16"], tmp_path / "a.png", "--gpu-index", "99")))
    assert "99" in line


def test_no_gpu_at_all(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    line = only_line(command("runtimes.cli", *words(artifacts["fp16"], tmp_path / "a.png"), env=hidden))
    assert "no GPU" in line


def test_the_first_gpu_by_its_number(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    done = command("runtimes.cli", *words(artifacts["fp16"], tmp_path / "a.png", "--gpu-index", "0"))
    assert done.returncode == 0, done.stderr


def test_out_of_memory_while_computing_is_one_line(artifacts: dict[str, Path], tmp_path: Path) -> None:
    """torch may take 24 MiB: enough for what the prompt needs, too little for pictures."""
    code = (
        "import sys, torch\n"
        "_, total = torch.cuda.mem_get_info()\n"
        "torch.cuda.set_per_process_memory_fraction((24 << 20) / total)\n"
        "from runtimes.cli import main; main(sys.argv[1:])"
    )
    line = [sys.executable, "-c", code, *words(artifacts["fp16"], tmp_path / "a.png")]
    told = only_line(subprocess.run(line, capture_output=True, text=True))
    assert "room" in told and "GB" in told and "--vae" in told


def test_a_gpu_that_others_filled_is_one_line(artifacts: dict[str, Path], command: Run, tmp_path: Path) -> None:
    """What is left doesn't even hold a context."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    hog = torch.empty(free - (200 << 20), dtype=torch.uint8, device="cuda")
    try:
        told = only_line(command("runtimes.cli", *words(artifacts["fp32"], tmp_path / "a.png")))
    finally:
        del hog
        torch.cuda.empty_cache()
    assert "GB" in told
