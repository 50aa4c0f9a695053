"""LoRA at run time on a compiled micro SDXL, against diffusers with the same products added to its weights.

Bound: latents differ by at most 1e-3 of their standard deviation (max abs).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

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
    with pytest.raises(SdxlError, match="It was made for another model"):
        ours.set_loras([good, Lora(lora_files.write(tmp_path / "b.safetensors", wrong, "kohya"))])
    assert torch.equal(draw(ours), with_it)


def test_through_diffusers_own_loader(
    ours: Pipeline, micro_model: Path, all_of_it: Pairs, tmp_path: Path
) -> None:
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


def test_engines_that_hold_their_weights_refuse(
    micro_onnx_artifact: Path, attention: Pairs, tmp_path: Path
) -> None:
    path = lora_files.write(tmp_path / "b.safetensors", attention, "peft")
    with pytest.raises(SdxlError, match="onnx backend.*sdxl-build onnx .*--lora"):
        runtimes.load(micro_onnx_artifact).load_lora_weights(path)
