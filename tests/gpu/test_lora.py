"""LoRA on the GPU: CUDA graphs and both resolutions see weights that change in place, and change back bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool import models
from tests import lora_files
from tests.gpu.conftest import Run
from tests.gpu.helpers import relative, stored
from tests.gpu.test_pictures import BOUNDS, draw

pytestmark = pytest.mark.gpu


def test_swapped_and_back(artifacts: dict[str, Path], command: Run, store_root: Path, tmp_path: Path) -> None:
    import json

    source = models.resolve("tiny")
    tensors: dict[str, Any] = {name: dict(source.tensors(name)) for name in ("unet", "text_encoder", "text_encoder_2")}
    pairs = lora_files.random_pairs(tensors, seed=1, only=("attn", "proj", "conv"))
    path = lora_files.write(tmp_path / "a.safetensors", pairs, "original", layers=2)
    ours = runtimes.load([artifacts["fp16"], artifacts["wide"]])
    wide = {"width": 320, "height": 192}
    plain, plain_wide = draw(ours, "latent").clone(), draw(ours, "latent", **wide).clone()
    before = {name: tensor.clone() for name, tensor in stored(ours.artifacts[0], "unet").items()}

    ours.load_lora_weights(path, 0.2)
    swapped = draw(ours, "latent").clone()
    assert not torch.equal(swapped, plain) and not torch.equal(draw(ours, "latent", **wide), plain_wide)
    built = command(
        "buildtool.cli", "torch", "--model", "tiny", "--gpu", "auto", "--precision", "fp16", "--lora", f"{path}:0.2",
        "--json", "--artifacts", str(store_root),
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (row,) = json.loads(built.stdout)["artifacts"]
    assert row["compiled"] == [] and relative(swapped, draw(runtimes.load(row["path"]), "latent")) <= BOUNDS["fp16"][0]

    ours.unload_lora_weights()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stored(ours.artifacts[0], "unet").items())
    assert torch.equal(draw(ours, "latent"), plain) and torch.equal(draw(ours, "latent", **wide), plain_wide)
