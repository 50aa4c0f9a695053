"""Arguments of the pipeline, and what it says of those that it can't take."""

import re
from pathlib import Path

import pytest
import torch

import runtimes
from buildtool.store.errors import SdxlError
from runtimes.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def micro(micro_artifact: Path) -> Pipeline:
    return runtimes.load(micro_artifact)


@pytest.mark.parametrize("name", ["clip_skip", "cross_attention_kwargs", "ip_adapter_image", "ip_adapter_image_embeds"])
def test_what_a_fixed_graph_cannot_serve_is_refused_by_name(micro: Pipeline, name: str) -> None:
    with pytest.raises(SdxlError, match=name):
        micro("a", num_inference_steps=1, **{name: 1})


def test_an_unknown_argument_is_a_type_error(micro: Pipeline) -> None:
    with pytest.raises(TypeError, match="mask_image"):
        micro("a", mask_image=0)


def test_a_picture_needs_an_encoder(micro: Pipeline) -> None:
    with pytest.raises(SdxlError, match="no VAE encoder") as caught:
        micro("a", image=torch.zeros(1, 3, 64, 64))
    assert caught.value.hint.endswith("--with-encoder")


@pytest.mark.parametrize("arguments", [{"strength": 0.1}, {"denoising_start": 0.999}])
def test_no_step_left_is_one_line(micro: Pipeline, arguments: dict[str, float]) -> None:
    with pytest.raises(SdxlError, match="none of 5 steps is left"):
        micro("a", image=torch.zeros(1, 4, 8, 8), num_inference_steps=5, **arguments)  # type: ignore[arg-type]


def test_a_scheduler_takes_what_its_class_takes(micro: Pipeline) -> None:
    with pytest.raises(SdxlError, match="DDIM takes no sigmas"):
        micro("a", scheduler="ddim", sigmas=[1.0, 0.0])
    with pytest.raises(SdxlError, match="no scheduler 'heun'"):
        micro("a", scheduler="heun")


def test_a_callback_cannot_ask_for_conditions(micro: Pipeline) -> None:
    with pytest.raises(SdxlError, match="prompt_embeds"):
        micro("a", callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


def test_another_size_names_those_that_are_there_and_the_command(micro: Pipeline) -> None:
    with pytest.raises(SdxlError, match=re.escape("No loaded artifact makes 128x64; they make: 64x64.")) as caught:
        micro("a", width=128)
    assert "--resolution 128x64" in caught.value.hint and "--resolution 64x64" not in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "Pass prompt or prompt_embeds"),
        ({"prompt": []}, "no prompt"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 77, 40)}, "not both"),
        ({"prompt_embeds": torch.zeros(1, 77, 40)}, "pooled_prompt_embeds"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "negative_prompt has 1 texts for 2 prompts"),
        ({"prompt": "a", "guidance_until": 1.5}, "fraction"),
        ({"prompt": "a", "generator": [torch.Generator(), torch.Generator()]}, "2 generators for 1 images"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 9, 9)}, "latents have shape"),
        ({"prompt": "a", "timesteps": [1], "sigmas": [1.0]}, "Only one"),
        ({"prompt": "a", "strength": 1.5}, "strength is a fraction"),
        ({"prompt": "a", "denoising_start": 0.5}, "denoising_start goes with image"),
        ({"prompt": "a", "image": torch.zeros(1, 4, 9, 9), "strength": 1.0}, "image holds latents"),
        ({"prompt": "a", "image": torch.zeros(2, 4, 8, 8), "strength": 1.0}, "2 pictures"),
    ],
)
def test_contradictions_are_told(micro: Pipeline, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        micro(num_inference_steps=1, **arguments)  # type: ignore[arg-type]


def test_steps_after_guidance_run_the_half_batch(micro: Pipeline) -> None:
    artifact = micro.artifacts[0]
    before = [artifact.engine("unet", v).calls for v in ("cfg", "nocfg")]
    micro("a", num_inference_steps=10, guidance_until=0.5, output_type="latent")
    after = [artifact.engine("unet", v).calls for v in ("cfg", "nocfg")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [6, 4]


def test_words_that_are_cut_are_named(micro: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    micro("red circle " * 60 + "the forgotten unicorn", num_inference_steps=1, output_type="latent")
    assert "the forgotten unicorn" in caplog.text


def test_progress_and_timings(micro: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    micro("a", num_inference_steps=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert set(micro.timings) == {"load", "encode", "denoise", "decode"}


def test_two_artifacts_of_one_size_are_refused(micro_artifact: Path) -> None:
    with pytest.raises(SdxlError, match="both make 64x64"):
        runtimes.load([micro_artifact, micro_artifact])


def test_resolutions_share_weights(micro_artifact: Path, micro_wide_artifact: Path) -> None:
    pipeline = runtimes.load([micro_artifact, micro_wide_artifact])
    square, wide = pipeline.artifacts
    for component, variant in (("unet", "cfg"), ("unet", "nocfg"), ("vae_decoder", "main")):
        a, b = square.engine(component, variant), wide.engine(component, variant)
        assert a is not b
        pointers = [{n: t.data_ptr() for n, t in e.constants.items()} for e in (a, b)]  # type: ignore[attr-defined]
        assert pointers[0] == pointers[1]
    assert square.engine("text_encoder") is wide.engine("text_encoder")
    assert (micro_artifact / "weights/unet.safetensors").samefile(micro_wide_artifact / "weights/unet.safetensors")
