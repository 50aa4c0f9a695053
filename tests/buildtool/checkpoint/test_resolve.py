"""Diffusers folders: what is read of a good one, and the one line that each bad one gets."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from buildtool import models
from buildtool.store.errors import SdxlError

Edit = Callable[..., None]
Tensors = dict[str, torch.Tensor]
UNET = "unet/diffusion_pytorch_model.safetensors"


def error_of(*args: str, **options: str) -> str:
    with pytest.raises(SdxlError) as caught:
        models.resolve(*args, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(small_model: Path, tensors: dict[str, Tensors]) -> None:
    source = models.resolve(str(small_model))
    assert (source.name, source.revision, source.variant, source.vae) == ("small-model", "", "", "default")
    assert source.default_size == (128, 128)
    assert source.configs["unet"]["_class_name"] == "UNet2DConditionModel"
    assert source.configs["text_encoder"]["_class_name"] == "CLIPTextModel"
    assert source.configs["pipeline"] == {"force_zeros_for_empty_prompt": True}
    flat = json.dumps(source.configs)
    assert "_diffusers_version" not in flat and "torch_dtype" not in flat and "transformers_version" not in flat
    for component, expected in tensors.items():
        found = source.tensors(component)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_refiner(small_refiner: Path, tensors: dict[str, Tensors]) -> None:
    source = models.resolve(str(small_refiner))
    assert set(source.weights) == set(source.parameters) == {"unet", "vae", "text_encoder_2"}
    assert source.tokenizers.keys() == source.tokenizer_folders.keys() == {"tokenizer_2"}
    assert source.configs["pipeline"] == {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    assert "text_encoder" not in source.configs
    assert source.tensors("text_encoder_2").keys() == tensors["text_encoder_2"].keys()
    assert source.tensors("unet")["add_embedding.linear_1.weight"].shape == (64, 72)


def test_a_refiner_that_does_not_fit(small_refiner: Path, edit: Edit, tensors: dict[str, Tensors]) -> None:
    index, unet = small_refiner / "model_index.json", small_refiner / "unet"
    edit(index, requires_aesthetics_score=False)
    assert "doesn't say requires_aesthetics_score" in error_of(str(small_refiner))
    edit(index, requires_aesthetics_score=True)
    save_file(tensors["unet"], unet / "diffusion_pytorch_model.safetensors")  # the base model's
    edit(unet / "config.json", cross_attention_dim=64, projection_class_embeddings_input_dim=32 + 6 * 8)
    assert "a refiner has one text encoder, which gives 40" in error_of(str(small_refiner))


def test_a_refiners_unet_in_a_base_model(small_model: Path, edit: Edit) -> None:
    config = small_model / "unet/config.json"
    edit(config, projection_class_embeddings_input_dim=32 + 5 * 8)
    unet = load_file(small_model / UNET)
    unet["add_embedding.linear_1.weight"] = torch.zeros(64, 72)
    save_file(unet, small_model / UNET)
    assert "its UNet is a refiner's" in error_of(str(small_model))


def test_tensors_load_strictly_into_the_libraries_modules(small_model: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    source = models.resolve(str(small_model))
    for component, module in (
        ("unet", UNet2DConditionModel.from_config(source.configs["unet"])),
        ("vae", AutoencoderKL.from_config(source.configs["vae"])),
        ("text_encoder", CLIPTextModel(CLIPTextConfig(**source.configs["text_encoder"]))),
        ("text_encoder_2", CLIPTextModelWithProjection(CLIPTextConfig(**source.configs["text_encoder_2"]))),
    ):
        tensors = dict(source.tensors(component))
        if not any(name.startswith("text_model.") for name in module.state_dict()):
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
        module.load_state_dict(tensors, strict=True)


def test_resolving_imports_no_torch_and_no_diffusers(small_model: Path) -> None:
    code = (
        "import sys; from buildtool import models; models.resolve(sys.argv[1]); models.resolve('random:sdxl-base');"
        "heavy = {'torch', 'diffusers', 'transformers', 'safetensors', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(small_model)], check=True)


def test_variant_changes_digests_and_tensors(small_model: Path) -> None:
    plain, half = models.resolve(str(small_model)), models.resolve(str(small_model), variant="fp16")
    assert half.variant == "fp16"
    assert all(half.weights[component] != plain.weights[component] for component in plain.weights)
    assert half.tensors("unet")["conv_in.weight"].dtype == torch.float16


def test_variant_of_some_components_only_falls_back_to_the_plain_files(small_model: Path) -> None:
    (small_model / "vae/diffusion_pytorch_model.fp16.safetensors").unlink()
    half = models.resolve(str(small_model), variant="fp16")
    assert half.tensors("vae")["decoder.conv_in.weight"].dtype == torch.float32


def test_shards(small_model: Path) -> None:
    whole = models.resolve(str(small_model))
    tensors = load_file(small_model / UNET)
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[:50], names[50:])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, small_model / "unet" / file)
        weight_map.update(dict.fromkeys(part, file))
    index = small_model / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (small_model / UNET).unlink()
    sharded = models.resolve(str(small_model))
    assert sharded.weights["unet"] != whole.weights["unet"]
    assert {k: v for k, v in sharded.weights.items() if k != "unet"} == {
        k: v for k, v in whole.weights.items() if k != "unet"
    }
    assert all(torch.equal(t, tensors[name]) for name, t in sharded.tensors("unet").items())
    (small_model / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "lacks diffusion_pytorch_model-00002-of-00002.safetensors" in error_of(str(small_model))
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../secret.safetensors"}}))
    assert "outside its folder" in error_of(str(small_model))


def test_same_architecture_saved_by_other_versions_has_the_same_configs(small_model: Path, edit: Edit) -> None:
    before = models.resolve(str(small_model)).configs
    edit(small_model / "unet/config.json", dropout=0.0, attention_type="default", upcast_attention=None)
    edit(small_model / "unet/config.json", _diffusers_version="0.42.1", reverse_transformer_layers_per_block=None)
    edit(small_model / "text_encoder_2/config.json", dtype="float16", transformers_version="5.23.0", use_cache=True)
    edit(small_model / "vae/config.json", latents_mean=None, shift_factor=None, use_quant_conv=True)
    assert models.resolve(str(small_model)).configs == before


def test_older_attention_names_of_a_vae(small_model: Path, tensors: dict[str, Tensors]) -> None:
    old = {}
    for name, tensor in tensors["vae"].items():
        for new, previous in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(new, previous)
        is_matrix = ".attentions." in name and tensor.ndim == 2
        old[name] = tensor[:, :, None, None].contiguous() if is_matrix else tensor
    save_file(old, small_model / "vae/diffusion_pytorch_model.safetensors")
    found = models.resolve(str(small_model)).tensors("vae")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors["vae"].items())


def test_changed_weights_and_tokenizers_change_their_digests_alone(
    small_model: Path, tensors: dict[str, Tensors]
) -> None:
    before = models.resolve(str(small_model))
    save_file(
        {**tensors["vae"], "decoder.conv_out.bias": torch.ones(3)},
        small_model / "vae/diffusion_pytorch_model.safetensors",
    )
    (small_model / "tokenizer_2/merges.txt").write_text("#version: 0.2\na b\n")
    after = models.resolve(str(small_model))
    assert {k for k in before.weights if before.weights[k] != after.weights[k]} == {"vae"}
    assert {k for k in before.tokenizers if before.tokenizers[k] != after.tokenizers[k]} == {"tokenizer_2"}


def test_truncated_empty_and_foreign_files(small_model: Path) -> None:
    path = small_model / UNET
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert "cut short" in error_of(str(small_model))
    path.write_bytes(whole[:40])
    assert "cut short" in error_of(str(small_model))
    path.write_bytes(b"")
    assert "is empty" in error_of(str(small_model))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5135149760\n")
    assert "LFS pointer" in error_of(str(small_model)) and "lfs pull" in error_of(str(small_model))
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "pickle" in error_of(str(small_model))
    path.write_bytes(b"<html>Not found</html>")
    assert "not a safetensors file" in error_of(str(small_model))
    path.write_bytes(struct.pack("<Q", 20) + b'{"a": [1, 2], "b": 1')
    assert "damaged" in error_of(str(small_model))
    header = json.dumps({"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(40))
    assert "damaged" in error_of(str(small_model))


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer_2", "scheduler"])
def test_a_missing_component(small_model: Path, name: str) -> None:
    shutil.rmtree(small_model / name)
    assert f"lacks its {name}" in error_of(str(small_model))


def test_missing_parts_of_components(small_model: Path) -> None:
    (small_model / "tokenizer/merges.txt").unlink()
    assert "neither vocab.json and merges.txt nor tokenizer.json" in error_of(str(small_model))
    other = small_model / "vae copy"
    shutil.copytree(small_model / "vae", other)
    assert f"Try --model {small_model}" in error_of(str(other))
    (small_model / "vae/config.json").unlink()
    assert "vae/config.json is missing" in error_of(str(small_model))
    (small_model / "unet/config.json").write_text("{")
    assert "not valid JSON" in error_of(str(small_model))
    (small_model / "model_index.json").unlink()
    (small_model / "text_encoder/config.json").unlink()
    assert "no model_index.json" in error_of(str(small_model))
    assert "is AutoencoderKL, not a model" in error_of(str(other))
    assert "For its file: --model" in error_of(str(small_model / "text_encoder"))


def test_variants_that_are_not_there(small_model: Path) -> None:
    assert "it has fp16" in error_of(str(small_model), variant="bf16")
    for path in small_model.glob("*/*.safetensors"):
        if ".fp16." not in path.name:
            path.unlink()
    assert "--variant fp16" in error_of(str(small_model))


def test_pickles_are_refused(small_model: Path, tmp_path: Path) -> None:
    for path in (small_model / "unet").glob("*.safetensors"):
        path.unlink()
    (small_model / "unet/diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "can run code" in error_of(str(small_model)) and "save_pretrained" in error_of(str(small_model))
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    assert "can run code" in error_of(str(tmp_path / "model.ckpt"))


def test_other_models(small_model: Path, edit: Edit) -> None:
    index, unet = small_model / "model_index.json", small_model / "unet/config.json"
    edit(unet, time_cond_proj_dim=256)
    assert "latent consistency" in error_of(str(small_model))
    edit(unet, time_cond_proj_dim=None, in_channels=9)
    assert "inpainting" in error_of(str(small_model))
    edit(unet, in_channels=4, addition_embed_type=None)
    assert "no size conditioning" in error_of(str(small_model))
    edit(index, _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])
    assert "refiner" in error_of(str(small_model))
    edit(unet, cross_attention_dim=768)
    edit(index, _class_name="StableDiffusionPipeline")
    assert "Stable Diffusion 1.x (StableDiffusionPipeline), not SDXL" in error_of(str(small_model))
    edit(index, _class_name="FluxPipeline", unet=[None, None])
    assert "FluxPipeline" in error_of(str(small_model))


def test_components_of_other_classes(small_model: Path, edit: Edit) -> None:
    edit(small_model / "unet/config.json", _class_name="UNet3DConditionModel")
    assert "its unet is UNet3DConditionModel, not UNet2DConditionModel" in error_of(str(small_model))
    edit(small_model / "unet/config.json", _class_name="UNet2DConditionModel")
    edit(small_model / "model_index.json", text_encoder_2=["transformers", "CLIPTextModel"])
    assert "its text_encoder_2 is CLIPTextModel, not CLIPTextModelWithProjection" in error_of(str(small_model))


def test_parts_that_do_not_fit(small_model: Path, edit: Edit, tensors: dict[str, Tensors]) -> None:
    save_file(tensors["text_encoder"], small_model / "text_encoder_2/model.safetensors")
    assert "does not" in error_of(str(small_model)) and "text_encoder_2" in error_of(str(small_model))
    save_file(tensors["text_encoder_2"], small_model / "text_encoder_2/model.safetensors")
    edit(small_model / "text_encoder/config.json", num_hidden_layers=3)
    assert "2 layers, the config says 3" in error_of(str(small_model))
    edit(small_model / "text_encoder/config.json", num_hidden_layers=2)
    edit(small_model / "unet/config.json", cross_attention_dim=72)
    assert "the config says 32x72" in error_of(str(small_model))
    edit(small_model / "unet/config.json", cross_attention_dim=64, transformer_layers_per_block=[1, 2, 2])
    source = models.resolve(str(small_model))  # no tell-tale: it is found when the tensors are read
    with pytest.raises(SdxlError, match="lacks"):
        source.tensors("unet")


def test_text_encoders_of_another_model(small_model: Path, edit: Edit, tensors: dict[str, Tensors]) -> None:
    shutil.rmtree(small_model / "text_encoder_2")
    shutil.copytree(small_model / "text_encoder", small_model / "text_encoder_2")
    path = small_model / "text_encoder_2/model.safetensors"
    save_file({**tensors["text_encoder"], "text_projection.weight": torch.zeros(24, 24)}, path)
    edit(small_model / "text_encoder_2/config.json", projection_dim=24)
    assert "reads text of width 64, the text encoders give 24 + 24" in error_of(str(small_model))


def test_vae_folder(small_model: Path, tmp_path: Path, edit: Edit) -> None:
    other = Path(shutil.copytree(small_model / "vae", tmp_path / "fixed-vae"))
    edit(other / "config.json", force_upcast=False)
    plain, source = models.resolve(str(small_model)), models.resolve(str(small_model), vae=str(other))
    assert (source.vae, source.configs["vae"]["force_upcast"]) == (str(other), False)
    assert source.configs["unet"] == plain.configs["unet"]
    assert models.resolve(str(small_model), vae=str(small_model)).weights == plain.weights  # a model's own vae/
    edit(other / "config.json", _class_name="AutoencoderKLWan")
    assert "AutoencoderKLWan" in error_of(str(small_model), vae=str(other))
    assert "--vae nowhere does not exist" in error_of(str(small_model), vae="nowhere")
    assert "is a file" in error_of(str(small_model), vae=str(small_model / UNET))


def test_options_that_do_not_apply(small_model: Path, tmp_path: Path) -> None:
    assert "--revision is for hub models" in error_of(str(small_model), revision="main")
    assert "--config is for a single" in error_of(str(small_model), config_dir=str(tmp_path))
    assert "--variant" in error_of("tiny", variant="fp16")
    assert "does not exist" in error_of(str(tmp_path / "nowhere"))
    assert "does not exist" in error_of("models/sdxl.safetensors")
