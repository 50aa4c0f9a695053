"""Single-file checkpoints: converted without a difference, and told what they are when they are something else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from buildtool import models
from buildtool.checkpoint import single_file, tensors
from buildtool.store.errors import SdxlError

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def single(original: Tensors, tmp_path: Path) -> Path:
    path = tmp_path / "My_Model v1.safetensors"
    save_file(original, path)
    return path


def resolve_error(path: Path, stored: Tensors, config: Path | None = None) -> str:
    save_file({name: tensor.clone().contiguous() for name, tensor in stored.items()}, path)
    with pytest.raises(SdxlError) as caught:
        models.resolve(str(path), config_dir=config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_tensor_survives_the_original_naming(
    single: Path, small_model: Path, tensors: dict[str, Tensors]
) -> None:
    source = models.resolve(str(single), config_dir=small_model)
    plain = models.resolve(str(small_model))
    for component in tensors:
        converted, expected = source.tensors(component), plain.tensors(component)
        assert set(converted) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(converted[name], tensor), name
    assert source.configs == plain.configs
    assert source.tokenizers == plain.tokenizers
    assert source.name == "my_model-v1"


def test_vae_prefix_of_other_tools(original: Tensors, small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({name.replace("first_stage_model.", "vae."): t for name, t in original.items()}, path)
    expected = models.resolve(str(small_model)).tensors("vae")
    converted = models.resolve(str(path), config_dir=small_model).tensors("vae")
    assert all(torch.equal(converted[name], tensor) for name, tensor in expected.items())


def test_marked_v_prediction_changes_the_scheduler(original: Tensors, small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    save_file({**original, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    scheduler = models.resolve(str(path), config_dir=small_model).configs["scheduler"]
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_without_configs_or_network_says_what_to_give(single: Path) -> None:
    with pytest.raises(SdxlError, match=r"stable-diffusion-xl-base-1\.0 .* --config DIR"):
        models.resolve(str(single))


def test_missing_tensor_is_told_when_tensors_are_read(original: Tensors, small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({n: t for n, t in original.items() if not n.endswith("middle_block.2.in_layers.2.weight")}, path)
    source = models.resolve(str(path), config_dir=small_model)
    with pytest.raises(SdxlError, match=r"lacks mid_block\.resnets\.1\.conv1\.weight"):
        source.tensors("unet")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, "inpainting"),
        ({"input_blocks.0.0.weight": torch.zeros(16, 8, 3, 3)}, "InstructPix2Pix"),
        ({"time_embed.cond_proj.weight": torch.zeros(16, 4)}, "latent consistency"),
        ({"input_blocks.0.0.weight": torch.zeros(24, 4, 3, 3)}, "conv_in.weight is 24x4x3x3"),
    ],
)
def test_unets_of_other_kinds(original: Tensors, small_model: Path, tmp_path: Path, spoil: Tensors, said: str) -> None:
    changed = {**original, **{f"model.diffusion_model.{name}": tensor for name, tensor in spoil.items()}}
    assert said in resolve_error(tmp_path / "m.safetensors", changed, small_model)


def test_other_models(original: Tensors, tmp_path: Path) -> None:
    path, one = tmp_path / "m.safetensors", torch.zeros(1)
    unet = {n: t for n, t in original.items() if n.startswith("model.diffusion_model.")}
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    clip = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert "Stable Diffusion 1.x" in resolve_error(path, {clip: one, key: torch.zeros(8, 768)})
    clip = "cond_stage_model.model.token_embedding.weight"
    assert "Stable Diffusion 2.x" in resolve_error(path, {clip: one, key: torch.zeros(8, 1024)})
    assert "refiner" in resolve_error(path, {**unet, "conditioner.embedders.0.model.positional_embedding": one})
    assert "a LoRA" in resolve_error(path, {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": one})
    assert "a LoRA" in resolve_error(path, {"unet.down_blocks.1.attentions.0.proj_in.lora_A.weight": one})
    assert "a LoRA" in resolve_error(path, {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": one})
    assert "a ControlNet" in resolve_error(
        path, {"controlnet_cond_embedding.conv_in.weight": one, "conv_in.weight": one}
    )
    assert "a VAE alone" in resolve_error(path, {"encoder.conv_in.weight": one, "decoder.conv_in.weight": one})
    assert "a UNet alone" in resolve_error(path, {"conv_in.weight": one, "mid_block.resnets.0.norm1.weight": one})
    assert "Flux" in resolve_error(path, {"double_blocks.0.img_attn.norm.key_norm.scale": one})
    assert "Playground" in resolve_error(path, {**original, "edm_mean": one})
    assert "text_encoder, text_encoder_2" in resolve_error(path, unet)
    assert "no SDXL UNet" in resolve_error(path, {"weight": one})


def test_names_of_the_full_size_architecture(as_original: Callable[[dict[str, Tensors]], Tensors]) -> None:
    """Ten blocks a layer and 32 text layers: numbers of two digits, which a small model doesn't have."""
    source = models.resolve("random:sdxl-base")
    plain = {c: tensors.module_shapes(c, source.configs[c]) for c in source.weights}
    with torch.device("meta"):
        original = as_original({c: {n: torch.empty(s) for n, s in shapes.items()} for c, shapes in plain.items()})
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    for component, prefixes in single_file._PREFIXES.items():
        getters = {name: lambda t=t: t for name, t in original.items() if name.startswith(prefixes)}
        converted = single_file.convert(component, source.configs[component], getters, shapes)
        found = {name: value.shape for name, value in converted.items() if not name.endswith("position_ids")}
        assert found == plain[component]
        assert all(converted[name].get().shape == shape for name, shape in list(found.items())[:50])
