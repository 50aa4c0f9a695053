"""A refiner's artifact beside its base model's, against diffusers on the same weights, on the CPU in fp32.

Bound: latents differ by at most 1e-3 of their standard deviation (max abs).
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image

import runtimes
from buildtool import models
from buildtool.store import manifest as manifests
from buildtool.store.errors import SdxlError
from buildtool.store.lora import Lora
from runtimes import refiner
from runtimes.diffusers_bridge import attach
from runtimes.jobs import Job
from runtimes.names import Names
from runtimes.pipeline import Pipeline
from runtimes.session import Planner, Session
from tests import lora_files
from tests.runtimes.stand_in import stand_in_manifest
from tests.runtimes.test_parity import difference, seeds

BOUND = 1e-3
CALL = {"prompt": "a large red circle", "num_inference_steps": 10, "output_type": "latent"}


# What is refused, before anything is loaded.


def test_a_size_that_no_refiner_makes_names_the_command() -> None:
    base, other = stand_in_manifest(), stand_in_manifest(width=96, refiner=True)
    with pytest.raises(SdxlError, match="No --refiner makes 64x64; those given make 96x64") as caught:
        refiner.find([other], base, (64, 64))
    assert "--resolution 64x64" in caught.value.hint
    assert refiner.find([other, base], base, (64, 64)) is base  # any model may refine


def test_latents_of_another_shape_are_refused() -> None:
    base = stand_in_manifest()
    pipeline = msgspec.structs.replace(base.pipeline, latent_channels=16)
    with pytest.raises(SdxlError, match="16 channels"):
        refiner.find([msgspec.structs.replace(base, pipeline=pipeline)], base, (64, 64))


def test_a_start_after_the_hand_over_is_refused() -> None:
    refiner.check_start(0.8, None)
    refiner.check_start(None, 0.1)
    refiner.check_start(0.8, 0.21)
    with pytest.raises(SdxlError, match=r"--strength 0\.1 .*--refine-at 0\.8 ") as caught:
        refiner.check_start(0.8, 0.1)
    assert "above 0.2" in caught.value.hint


# From here on with engines.


def from_diffusers(name: str, folder: Path) -> Any:
    import diffusers

    pipeline = getattr(diffusers, name).from_pretrained(folder, dtype=torch.float32, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def theirs(micro_model: Path, micro_refiner_model: Path) -> tuple[Any, Any]:
    """diffusers' base and refiner."""
    return (
        from_diffusers("StableDiffusionXLPipeline", micro_model),
        from_diffusers("StableDiffusionXLImg2ImgPipeline", micro_refiner_model),
    )


@pytest.fixture(scope="module")
def ours(micro_artifact: Path, micro_refiner_artifact: Path) -> tuple[Pipeline, Pipeline]:
    base = runtimes.load(micro_artifact)
    return base, runtimes.load(micro_refiner_artifact, beside=base)


def hand_over(pair: tuple[Any, Any], at: float, **arguments: Any) -> torch.Tensor:
    base, second = pair
    generator, call = seeds(1), {**CALL, **arguments}
    latents = base(generator=generator, denoising_end=at, **call).images
    made: torch.Tensor = second(generator=generator, image=latents, denoising_start=at, **call).images
    return made


@pytest.mark.slow
@pytest.mark.parametrize("at", [0.8, 0.9])
@pytest.mark.parametrize("arguments", [{}, {"negative_prompt": "green"}, {"guidance_scale": 1.0}])
def test_hand_over(ours: Any, theirs: Any, at: float, arguments: dict[str, Any]) -> None:
    assert difference(hand_over(ours, at, **arguments), hand_over(theirs, at, **arguments)) <= BOUND


@pytest.mark.slow
def test_the_refiner_has_a_part_in_it(ours: Any) -> None:
    whole = ours[0](generator=seeds(1), **CALL).images
    assert difference(hand_over(ours, 0.8), whole) > 0.05
    assert ours[1].unet_steps["full"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"strength": 0.75, "prompt_2": "what only a first text encoder would read"},
        {"aesthetic_score": 3.0, "negative_aesthetic_score": 7.5, "original_size": (512, 256), "target_size": (8, 8)},
        {"negative_original_size": (99, 33), "negative_crops_coords_top_left": (7, 5), "crops_coords_top_left": (1, 2)},
    ],
)
def test_a_pictures_latents_are_refined(ours: Any, theirs: Any, arguments: dict[str, Any]) -> None:
    latents = theirs[0](generator=seeds(1), **CALL).images
    reference = theirs[1](generator=seeds(2), image=latents, **{**CALL, **arguments}).images
    assert difference(ours[1](generator=seeds(2), image=latents, **{**CALL, **arguments}).images, reference) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [{"aesthetic_score": 1.0}, {"negative_aesthetic_score": 6.0}, {"negative_crops_coords_top_left": (9, 9)}],
)
def test_scores_and_sizes_matter(ours: Any, arguments: dict[str, Any]) -> None:
    """The comparison above would see one that was left out."""
    call = {**CALL, "image": torch.zeros(1, 4, 8, 8), "strength": 1.0}
    plain, other = (ours[1](generator=seeds(2), **call, **some).images for some in ({}, arguments))
    assert difference(other, plain) > 2 * BOUND


@pytest.mark.slow
def test_a_refiner_alone_needs_a_picture(ours: Any) -> None:
    with pytest.raises(SdxlError, match="is a refiner: it goes on from a picture") as caught:
        ours[1](**CALL)
    assert "--refiner DIR" in caught.value.hint


@pytest.mark.slow
def test_what_is_the_same_is_there_once(ours: Any, micro_artifact: Path, micro_refiner_artifact: Path) -> None:
    base, second = (pipeline.artifacts[0] for pipeline in ours)
    assert set(second.manifest.components) == {"text_encoder_2", "unet", "vae_decoder"}
    assert not (micro_refiner_artifact / "tokenizer.json").exists()
    for name in ("text_encoder_2", "vae_decoder"):
        assert second.engine(name) is base.engine(name)
        file = f"weights/{name}.safetensors"
        assert (micro_refiner_artifact / file).samefile(micro_artifact / file)
    assert second.engine("unet", "cfg") is not base.engine("unet", "cfg")
    digests = {m.files[c.weights].sha256 for m in (base.manifest, second.manifest) for c in m.components.values()}
    assert len(base._weights._files) == len(digests) == 5


@pytest.mark.slow
def test_loading_beside_says_what_does_not_go(micro_refiner_artifact: Path, ours: Any) -> None:
    with pytest.raises(SdxlError, match="memory='staged' was asked for beside a pipeline of memory='resident'"):
        runtimes.load(micro_refiner_artifact, memory="staged", beside=ours[0])


@pytest.mark.slow
def test_a_lora_of_shared_weights_is_refused(ours: Any, micro_model: Path, tmp_path: Path) -> None:
    source = models.resolve(str(micro_model))
    tensors = {name: dict(source.tensors(name)) for name in ("unet", "text_encoder_2")}
    both = lora_files.write(
        tmp_path / "both.safetensors", lora_files.random_pairs(tensors, 1, ("q_proj", "to_q")), "peft"
    )
    only = {"unet": tensors["unet"]}
    unet = lora_files.write(tmp_path / "unet.safetensors", lora_files.random_pairs(only, 1, ("to_q",)), "peft")
    with pytest.raises(SdxlError, match="changes text_encoder_2, whose weights the refiner reads too") as caught:
        ours[0].set_loras([Lora(both)])
    assert caught.value.hint.endswith(f"--lora {both}")
    plain = hand_over(ours, 0.8)
    ours[0].set_loras([Lora(unet)])
    assert not torch.equal(hand_over(ours, 0.8), plain)
    ours[0].set_loras([])
    assert torch.equal(hand_over(ours, 0.8), plain)
    alone = runtimes.load(ours[0].artifacts[0].folder)
    alone.set_loras([Lora(both)])
    with pytest.raises(SdxlError, match="changes text_encoder_2"):  # also where the refiner comes later
        runtimes.load(ours[1].artifacts[0].folder, beside=alone)


@pytest.mark.slow
def test_inside_diffusers_own_refiner(theirs: Any, micro_refiner_model: Path, micro_refiner_artifact: Path) -> None:
    attached = attach(from_diffusers("StableDiffusionXLImg2ImgPipeline", micro_refiner_model), micro_refiner_artifact)
    latents = theirs[0](generator=seeds(1), **CALL).images
    made, reference = (pipe(generator=seeds(2), image=latents, **CALL).images for pipe in (attached, theirs[1]))
    assert difference(made, reference) <= BOUND


@pytest.mark.slow
def test_a_run_of_both_models_staged_and_resident(
    ours: Any, micro_artifact: Path, micro_refiner_artifact: Path, tmp_path: Path, opened: list[tuple[str, str]]
) -> None:
    read, second = manifests.read(micro_artifact), manifests.read(micro_refiner_artifact)
    options = Job(prompt="", seed=1, steps=10, guidance=5.0, guidance_until=1.0, num_images=1, refine_at=0.8)
    asked = [Job(prompt="a large red circle"), Job(prompt="b", refine_strength=0.5), Job(prompt="c", refine_at=0.5)]
    drawn = {}
    for mode in ("resident", "staged"):
        base = runtimes.load(micro_artifact, memory=mode)
        beside = runtimes.load(micro_refiner_artifact, memory=mode, beside=base)
        planner = Planner([read], options, Names(str(tmp_path / mode) + "/"), mode, [second])
        session = Session(base, lambda title: nullcontext(), beside)
        opened.clear()
        drawn[mode] = [picture.path for picture in session.render(planner.plan(asked))]
        assert sorted(opened) == [
            *(("micro", name) for name in ("text_encoder.main", "text_encoder_2.main", "unet.cfg")),
            *(("micro-refiner", name) for name in ("unet.cfg", "vae_decoder.main")),
        ]
        assert session.report()["unet_steps"]["full"] == (8 + 2) + (10 + 5) + (5 + 5)
        if mode == "staged":  # the last stage's alone
            assert {digests[0] for digests in base.artifacts[0]._engines} == {"vae_decoder"}
    for one, other in zip(drawn["resident"], drawn["staged"], strict=True):
        assert one.read_bytes() == other.read_bytes()
    # They are what two calls from Python give.
    wanted = hand_over(ours, 0.8)
    picture = Image.open(drawn["staged"][0])
    assert list(ours[1].decode(wanted)[0].getdata()) == list(picture.getdata())
    assert "Refiner: micro-refiner, Refiner switch at: 0.8" in picture.info["parameters"]
    told = json.loads(picture.info["sdxl-build"])
    assert told["artifact"]["model"] == "micro" and told["refiner_artifact"]["manifest"] == second.digest
    assert "Refiner strength: 0.5" in Image.open(drawn["staged"][1]).info["parameters"]
