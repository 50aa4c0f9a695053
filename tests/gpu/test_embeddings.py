"""Textual inversion on the GPU: rows that change under CUDA graphs, and change back bit by bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runtimes
from tests.gpu.conftest import Run
from tests.gpu.helpers import relative, stored
from tests.gpu.test_pictures import BOUNDS, diffusers_pipeline, draw

pytestmark = pytest.mark.gpu

PROMPT = {"prompt": "a large <new> circle on the left"}


def test_latents_are_diffusers_own_and_come_back(command: Run, store_root: Path, tmp_path: Path) -> None:
    words = ["torch", "--model", "tiny", "--gpu", "auto", "--precision", "fp16", "--spare-tokens", "4", "--json"]
    built = command("buildtool.cli", *words, "--artifacts", str(store_root))
    assert built.returncode == 0, built.stderr
    ours, theirs = runtimes.load(json.loads(built.stdout)["artifacts"][0]["path"]), diffusers_pipeline("fp16")
    path = tmp_path / "new.safetensors"
    rows = {}  # of two words: of random numbers the trained model makes more of rounding
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(theirs, f"text_encoder{suffix}"), getattr(theirs, f"tokenizer{suffix}")
        ids = tokenizer("red striped").input_ids[1:3]
        rows[name] = encoder.get_input_embeddings().weight[ids].detach().float().cpu()
    save_file(rows, path)
    plain = draw(ours, "latent", **PROMPT).clone()
    there = ours.artifacts[0]
    before: dict[str, Any] = {
        name: {k: t.clone() for k, t in stored(there, name).items()} for name in ("text_encoder", "text_encoder_2")
    }

    ours.load_textual_inversion(path, "<new>")
    made = draw(ours, "latent", **PROMPT).clone()
    state = load_file(path)
    for name, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(theirs, f"text_encoder{suffix}"), getattr(theirs, f"tokenizer{suffix}")
        theirs.load_textual_inversion(state[name], token="<new>", text_encoder=encoder, tokenizer=tokenizer)
    assert relative(made, draw(theirs, "latent", **PROMPT)) <= BOUNDS["fp16"][0]
    assert relative(made, plain) > BOUNDS["fp16"][0]

    ours.unload_textual_inversion()
    assert all(torch.equal(t, before[name][k]) for name in before for k, t in stored(there, name).items())
    assert torch.equal(draw(ours, "latent", **PROMPT), plain)
    staged = runtimes.load(there.folder, memory="staged")
    staged.load_textual_inversion(path, "<new>")
    for _ in range(2):  # what was freed comes back, and gets its words again
        assert relative(draw(staged, "latent", **PROMPT), made) <= BOUNDS["fp16"][0]
