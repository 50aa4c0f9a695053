"""The models that need no download: the shipped tiny one, and random weights of a given architecture."""

from pathlib import Path

import pytest
import torch

from buildtool import models
from buildtool.store.errors import SdxlError


@pytest.fixture(autouse=True)
def own_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def error_of(model: str, vae: str = "default") -> str:
    with pytest.raises(SdxlError) as caught:
        models.resolve(model, vae=vae)
    return str(caught.value)


def test_tiny_is_shipped_and_whole() -> None:
    source = models.resolve("tiny")
    assert (source.name, source.revision, source.variant) == ("tiny", "", "")
    assert source.default_size == (256, 256)
    assert set(source.weights) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    for component in source.weights:
        assert all(torch.isfinite(tensor).all() for tensor in source.tensors(component).values())


def test_tiny_is_the_shipped_one_whatever_lies_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.resolve("tiny").name == "tiny"
    assert "no model_index.json" in error_of("./tiny")


def test_tiny_has_a_tiny_vae_of_its_own() -> None:
    plain, small = models.resolve("tiny"), models.resolve("tiny", vae="tiny")
    assert small.configs["vae"]["_class_name"] == "AutoencoderTiny"
    assert small.weights["vae"] != plain.weights["vae"]
    assert {k: v for k, v in small.weights.items() if k != "vae"} == {
        k: v for k, v in plain.weights.items() if k != "vae"
    }
    assert small.default_size == plain.default_size
    assert len(small.tensors("vae")) > 0
    assert "tiny model has its own" in error_of("tiny", "fp16-fix")


def test_random_tiny_is_tinys_architecture_with_weights_by_seed() -> None:
    tiny = models.resolve("tiny")
    zero, again, one = (models.resolve(m) for m in ("random:tiny", "random:tiny:0", "random:tiny:1"))
    assert (zero.name, one.name) == ("random-tiny", "random-tiny-1")
    assert zero.configs == tiny.configs and zero.tokenizers == tiny.tokenizers
    assert zero.weights == again.weights
    assert all(zero.weights[c] != other.weights[c] for c in zero.weights for other in (one, tiny))
    for component in zero.weights:
        a, b, shipped = zero.tensors(component), one.tensors(component), tiny.tensors(component)
        assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in shipped.items()}
        assert all(torch.equal(a[name], again.tensors(component)[name]) for name in list(a)[:3])
        assert not any(torch.equal(a[name], b[name]) for name in a)
    assert models.resolve("random:tiny:1", vae="tiny").configs["vae"]["_class_name"] == "AutoencoderTiny"


def test_random_tiny_computes_sane_numbers() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    source = models.resolve("random:tiny")
    config = source.configs["unet"]
    unet = UNet2DConditionModel.from_config(config)
    unet.load_state_dict(dict(source.tensors("unet")))
    generator = torch.Generator().manual_seed(0)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    conditions = {
        "text_embeds": torch.randn(1, pooled, generator=generator),
        "time_ids": torch.tensor([[256.0, 256, 0, 0, 256, 256]]),
    }
    latents = torch.randn(1, 4, 16, 16, generator=generator)
    text = torch.randn(1, 77, config["cross_attention_dim"], generator=generator)
    with torch.no_grad():
        noise = unet(latents, 500, text, added_cond_kwargs=conditions).sample
        vae = AutoencoderKL.from_config(source.configs["vae"])
        vae.load_state_dict(dict(source.tensors("vae")))
        picture = vae.decode(latents).sample
    assert 0.05 < noise.std() < 5
    assert 0.05 < picture.std() < 5


def test_random_sdxl_is_full_size_and_known_without_being_made() -> None:
    source = models.resolve("random:sdxl-base")
    assert source.default_size == (1024, 1024)
    assert source.configs["unet"]["transformer_layers_per_block"] == [1, 2, 10]
    small, fixed = (models.resolve("random:sdxl-base:7", vae=vae) for vae in ("tiny", "fp16-fix"))
    assert small.configs["vae"]["_class_name"] == "AutoencoderTiny"
    assert fixed.configs["vae"] == {**source.configs["vae"], "force_upcast": False}
    assert small.name == "random-sdxl-base-7"
    assert small.tensors("vae")["decoder.layers.0.weight"].dtype == torch.float16


@pytest.mark.parametrize("base", ["tiny", "random:tiny", "random:sdxl-base"])
def test_a_shipped_models_refiner_has_all_but_its_unet_of_it(base: str) -> None:
    whole, refiner = models.resolve(base), models.resolve(base.replace("sdxl-base", "sdxl") + "-refiner")
    assert refiner.name == base.replace(":", "-").replace("sdxl-base", "sdxl") + "-refiner"
    assert refiner.default_size == whole.default_size
    assert refiner.weights.keys() == {"unet", "vae", "text_encoder_2"}
    assert refiner.weights["unet"] != whole.weights["unet"]
    for name in ("vae", "text_encoder_2"):
        assert (refiner.weights[name], refiner.configs[name]) == (whole.weights[name], whole.configs[name])
    assert refiner.configs["scheduler"] == whole.configs["scheduler"]
    assert refiner.configs["pipeline"] == {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    assert refiner.tokenizers == {"tokenizer_2": whole.tokenizers["tokenizer_2"]}
    assert models.resolve("tiny-refiner", vae="tiny").configs["vae"]["_class_name"] == "AutoencoderTiny"
    assert refiner.tensors("unet")["conv_in.weight"].shape[0] == refiner.configs["unet"]["block_out_channels"][0]


@pytest.mark.parametrize("model", ["random:", "random:sdxl", "random:tiny:x", "random:tiny:1:2", "random:tiny:-1"])
def test_unknown_random_models(model: str) -> None:
    assert "Try random:sdxl-base" in error_of(model)


@pytest.mark.parametrize("model", ["nowhere", "a/b/c", "models/x.safetensors", "~/nowhere", ""])
def test_models_that_do_not_exist(model: str) -> None:
    assert "does not exist" in error_of(model) or "no diffusers folder" in error_of(model)


def test_parameters_are_counted_as_the_modules_have_them() -> None:
    import math

    from buildtool.checkpoint import tensors

    shipped = ("tiny", "random:tiny", "random:sdxl-base", "tiny-refiner", "random:tiny-refiner", "random:sdxl-refiner")
    for model in shipped:
        for vae in ("default", "tiny"):
            source = models.resolve(model, vae=vae)
            assert ("text_encoder" in source.parameters) == ("refiner" not in model)
            for component in source.parameters:
                shapes = tensors.module_shapes(component, source.configs[component])
                assert source.parameters[component] == sum(map(math.prod, shapes.values())), (model, vae, component)
