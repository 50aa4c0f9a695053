"""LoRA at run time on a compiled micro SDXL, against diffusers with the same products added to its weights.

Bound: latents differ by at most 1e-3 of their standard deviation (max abs).
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import runtimes
from buildtool import models
from buildtool.store.errors import SdxlError
from buildtool.store.lora import Lora
from runtimes.pipeline import Pipeline
from tests import lora_files
from tests.conftest import Builder
from tests.lora_files import Pairs
from tests.runtimes.test_parity import difference, seeds

pytestmark = pytest.mark.slow

BOUND = 1e-3
CALL = {"prompt": "a large red circle", "num_inference_steps": 6, "output_type": "latent"}
LORA_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def tensors(micro_model: Path) -> dict[str, Any]:
    source = models.resolve(str(micro_model))
    return {name: dict(source.tensors(name)) for name in LORA_COMPONENTS}


@pytest.fixture(scope="module")
def all_of_it(tensors: dict[str, Any]) -> Pairs:
    """Every matrix and convolution: fused ones, joined ones, and a layer that nothing reads."""
    return lora_files.random_pairs(tensors, seed=1)


@pytest.fixture(scope="module")
def attention(tensors: dict[str, Any]) -> Pairs:
    return lora_files.random_pairs(tensors, seed=2, only=("attn2.to_k", "attn1.to_v"))


@pytest.fixture(scope="module")
def ours(micro_artifact: Path) -> Pipeline:
    return runtimes.load(micro_artifact)


@pytest.fixture(autouse=True)
def unloaded(ours: Pipeline) -> None:
    ours.unload_lora_weights()


def draw(pipeline: Any) -> torch.Tensor:
    latents: torch.Tensor = pipeline(generator=seeds(1), **CALL).images
    return latents


def reference(micro_model: Path, *loras: tuple[Pairs, float, float]) -> torch.Tensor:
    """diffusers' latents with products added to its state dicts: (pairs, scale, alpha) each."""
    from diffusers import StableDiffusionXLPipeline

    theirs = StableDiffusionXLPipeline.from_pretrained(micro_model, dtype=torch.float32, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    for pairs, scale, alpha in loras:
        for (component, name), pair in pairs.items():
            state = getattr(theirs, component).state_dict()
            weight = state[name if name in state else name.removeprefix("text_model.")]
            weight.copy_(lora_files.fused(weight, pair, scale, alpha))
    return draw(theirs)


@pytest.mark.parametrize("spelling", ["kohya", "original", "peft", "diffusers"])
def test_the_latents_are_those_of_diffusers_with_the_products_added(
    ours: Pipeline, micro_model: Path, all_of_it: Pairs, tmp_path: Path, spelling: str
) -> None:
    plain = draw(ours)
    ours.load_lora_weights(lora_files.write(tmp_path / "a.safetensors", all_of_it, spelling), 0.8)
    made = draw(ours)
    # Without an alpha it is the rank.
    alpha = lora_files.ALPHA if spelling in ("kohya", "original") else float(lora_files.RANK)
    assert difference(made, reference(micro_model, (all_of_it, 0.8, alpha))) <= BOUND
    assert difference(made, plain) > 100 * BOUND


def test_built_in(
    ours: Pipeline, sdxl_build: Builder, micro_model: Path, all_of_it: Pairs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = lora_files.write(tmp_path_factory.mktemp("lora") / "a.safetensors", all_of_it, "kohya")
    built = sdxl_build(str(micro_model), "--lora", f"{path}:0.8")
    assert built["compiled"] == []  # a change of weights: the code is that of the plain artifact
    fused = runtimes.load(built["path"])
    made = draw(fused)
    assert difference(made, reference(micro_model, (all_of_it, 0.8, lora_files.ALPHA))) <= BOUND
    ours.load_lora_weights(path, 0.8)
    swapped = weights(ours)
    assert all(torch.equal(t, swapped[n]) for n, t in weights(fused).items())


def test_two_at_once(ours: Pipeline, micro_model: Path, all_of_it: Pairs, attention: Pairs, tmp_path: Path) -> None:
    ours.load_lora_weights(lora_files.write(tmp_path / "a.safetensors", all_of_it, "kohya"), 0.8)
    ours.load_lora_weights(lora_files.write(tmp_path / "b.safetensors", attention, "peft"), -0.5)
    both = ((all_of_it, 0.8, lora_files.ALPHA), (attention, -0.5, float(lora_files.RANK)))
    assert difference(draw(ours), reference(micro_model, *both)) <= BOUND


def weights(pipeline: Pipeline) -> dict[tuple[str, str], torch.Tensor]:
    (artifact,) = pipeline.artifacts
    return {(c, n): t.clone() for c in LORA_COMPONENTS for n, t in artifact.tensors(c).items()}


def test_one_then_another_then_none_gives_the_original_bits(
    ours: Pipeline, all_of_it: Pairs, attention: Pairs, tmp_path: Path
) -> None:
    a = lora_files.write(tmp_path / "a.safetensors", all_of_it, "kohya")
    b = lora_files.write(tmp_path / "b.safetensors", attention, "peft")
    original, plain = weights(ours), draw(ours)
    engines = [ours.artifacts[0].engine("unet", v) for v in ("cfg", "nocfg")]
    addresses = [{n: t.data_ptr() for n, t in engine.constants.items()} for engine in engines]  # type: ignore[attr-defined]

    ours.set_loras([Lora(b)])
    only_b = draw(ours)
    ours.set_loras([Lora(a, 1.5)])
    with_a = weights(ours)
    assert not torch.equal(draw(ours), only_b)
    ours.set_loras([Lora(b)])
    assert torch.equal(draw(ours), only_b)  # nothing of the first is left
    changed = {n for n, t in weights(ours).items() if not torch.equal(t, original[n])}
    assert changed and changed < {n for n, t in with_a.items() if not torch.equal(t, original[n])}
    ours.unload_lora_weights()
    assert all(torch.equal(t.view(torch.int32), original[n].view(torch.int32)) for n, t in weights(ours).items())
    assert torch.equal(draw(ours), plain)
    after = [{n: t.data_ptr() for n, t in engine.constants.items()} for engine in engines]  # type: ignore[attr-defined]
    assert after == addresses


def test_a_file_that_is_refused_changes_nothing(ours: Pipeline, all_of_it: Pairs, tmp_path: Path) -> None:
    good = Lora(lora_files.write(tmp_path / "a.safetensors", all_of_it, "kohya"))
    ours.set_loras([good])
    with_it = draw(ours)
    wrong = {(c, n): (up[: len(up) // 2], down) for (c, n), (up, down) in all_of_it.items()}
    with pytest.raises(SdxlError, match="It is for another model"):
        ours.set_loras([good, Lora(lora_files.write(tmp_path / "b.safetensors", wrong, "kohya"))])
    assert torch.equal(draw(ours), with_it)


def test_through_diffusers_own_loader(ours: Pipeline, micro_model: Path, all_of_it: Pairs, tmp_path: Path) -> None:
    """``load_lora_weights`` and ``fuse_lora``, where PEFT is installed."""
    pytest.importorskip("peft")
    from diffusers import StableDiffusionXLPipeline

    kept = {k: v for k, v in all_of_it.items() if k[0] == "unet"}
    path = lora_files.write(tmp_path / "a.safetensors", kept, "original")
    theirs = StableDiffusionXLPipeline.from_pretrained(micro_model, dtype=torch.float32, add_watermarker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(path))
    theirs.fuse_lora(lora_scale=0.8)
    ours.load_lora_weights(path, 0.8)
    assert difference(draw(ours), draw(theirs)) <= BOUND


def test_engines_that_hold_their_weights_refuse(micro_onnx_artifact: Path, attention: Pairs, tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "b.safetensors", attention, "peft")
    with pytest.raises(SdxlError, match=r"onnx backend.*sdxl-build onnx .*--lora"):
        runtimes.load(micro_onnx_artifact).load_lora_weights(path)


def test_lines_of_json_swap_it(micro_artifact: Path, attention: Pairs, tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "b.safetensors", attention, "peft")
    job = {"prompt": "a", "seed": 1, "steps": 2, "num_images": 1}
    lines = [
        job,
        {**job, "lora": [f"{path}:3"]},
        job,
        {**job, "lora": ["none.safetensors"]},
        {**job, "lora": [str(path)]},
    ]
    command = [sys.executable, "-m", "runtimes.cli", "--engine", str(micro_artifact), "--prompts", "-", "--json"]
    done = subprocess.run(
        command, input="\n".join(map(json.dumps, lines)), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert "none.safetensors does not exist" in answers[3]["error"]
    pixels = [Image.open(tmp_path / a["images"][0]["path"]).tobytes() for a in answers if "images" in a]
    assert pixels[0] == pixels[2] and len(set(pixels)) == 3
    assert answers[1]["images"][0]["lora"] == [f"{path}:3"] and answers[2]["images"][0]["lora"] == []


def test_a_wrong_option_is_one_line_before_torch(micro_onnx_artifact: Path, attention: Pairs, tmp_path: Path) -> None:
    path = lora_files.write(tmp_path / "b.safetensors", attention, "peft")
    script = (
        "import sys; from runtimes import cli\n"
        f"try: cli.main(['--engine', {str(micro_onnx_artifact)!r}, '--prompt', 'a', '--lora', '{path}:0.5'])\n"
        "finally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: A LoRA can't go into") and f"--lora {path}:0.5" in line
    assert done.stdout == "False\n"
