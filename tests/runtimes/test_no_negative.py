"""An artifact without a negative prompt, built for real."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool.store.errors import SdxlError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def without(build_guided: Callable[..., Path], micro_model: Path, micro_artifact: Path) -> Path:
    return build_guided(micro_model, no_negative_prompt=True)


def latents(pipeline: Any, **options: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    made: torch.Tensor = pipeline(
        ["a red circle", "two", ""], num_inference_steps=4, generator=generators, output_type="latent", **options
    ).images
    return made


def test_latents_are_the_plain_artifacts(without: Path, micro_artifact: Path) -> None:
    mine, plain = latents(runtimes.load(without)), latents(runtimes.load(micro_artifact))
    assert (mine - plain).abs().max() < 1e-5 * plain.std()


def test_a_negative_prompt_is_refused_in_any_form(without: Path, micro_artifact: Path) -> None:
    pipeline = runtimes.load(without)
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt("a")
    given = {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative + 1,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    for options in ({"prompt": "a", "negative_prompt": ""}, {"prompt": "a", "negative_prompt_2": ["b"]}, given):
        with pytest.raises(SdxlError, match="takes none, not even an empty one"):
            pipeline(**options, num_inference_steps=2)
