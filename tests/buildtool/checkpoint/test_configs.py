"""The table of defaults is the libraries' own, and the shipped SDXL configs are SDXL's."""

import inspect
import math

import pytest

from buildtool import models
from buildtool.checkpoint import configs, tensors


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny", "EulerDiscreteScheduler", "CLIPTextModel"]
)
def test_defaults_are_the_installed_libraries(name: str) -> None:
    import diffusers
    import transformers

    if name == "CLIPTextModel":
        theirs = {k: getattr(transformers.CLIPTextConfig(), k) for k in configs.DEFAULTS[name]}
    else:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        theirs = {k: p.default for k, p in parameters.items() if k != "self" and p.kind is p.POSITIONAL_OR_KEYWORD}
    spelled = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items()}
    assert configs.DEFAULTS[name] == spelled


@pytest.mark.parametrize(
    ("component", "class_name", "parameters"),
    [
        ("unet", "UNet2DConditionModel", 2_567_463_684),
        ("vae", "AutoencoderKL", 83_653_863),
        ("vae_tiny", "AutoencoderTiny", 2_445_063),
        ("text_encoder", "CLIPTextModel", 123_060_480),
        ("text_encoder_2", "CLIPTextModelWithProjection", 694_659_840),
    ],
)
def test_shipped_sdxl_configs_give_sdxls_parameter_counts(component: str, class_name: str, parameters: int) -> None:
    config = configs.read_component(models.SDXL_BASE, component, class_name)
    shapes = tensors.module_shapes(component, config)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_a_config_keeps_what_it_says_and_says_what_it_left_out() -> None:
    raw = {"_class_name": "AutoencoderKL", "_name_or_path": "../vae", "force_upcast": False, "torch_dtype": "float16"}
    clean = configs.clean(raw)
    assert clean["force_upcast"] is False and clean["scaling_factor"] == 0.18215
    assert clean["_class_name"] == "AutoencoderKL"
    assert not {"_name_or_path", "torch_dtype"} & set(clean)


def test_unknown_classes_keep_their_config() -> None:
    assert configs.clean({"beta_start": 1}, "LCMScheduler") == {"_class_name": "LCMScheduler", "beta_start": 1}


def test_pixels_per_latent() -> None:
    assert configs.vae_scale_factor({"block_out_channels": [1, 2, 3, 4]}) == 8
    assert configs.vae_scale_factor(configs.clean({}, "AutoencoderTiny")) == 8
