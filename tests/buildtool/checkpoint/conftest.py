"""A small SDXL-shaped model of random weights, as the libraries and the original code would store it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from buildtool.checkpoint import configs, random_weights

CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.19.0.dev0",
        "sample_size": 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "attention_head_dim": [1, 2, 2],
        "block_out_channels": [16, 32, 32],
        "cross_attention_dim": 24 + 40,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "transformer_layers_per_block": [1, 1, 2],
        "use_linear_projection": True,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "scaling_factor": 0.13025,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"],
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0",
    },
    "text_encoder_2": {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": 40,
        "intermediate_size": 80,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "projection_dim": 32,
        "vocab_size": 100,
    },
}
CLASSES = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
Tensors = dict[str, torch.Tensor]


def weights_of(component: str) -> Tensors:
    """Random tensors under the names that published files have."""
    config = configs.clean(CONFIGS[component], CLASSES[component][1])
    return dict(random_weights.load(component, config, 1, "float32"))


@pytest.fixture(scope="session")
def tensors() -> dict[str, Tensors]:
    """Component -> its tensors."""
    return {component: weights_of(component) for component in CONFIGS}


@pytest.fixture(scope="session")
def _small_model(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensors]) -> Path:
    root = tmp_path_factory.mktemp("models") / "Small Model"
    for component, config in CONFIGS.items():
        (root / component).mkdir(parents=True)
        (root / component / "config.json").write_text(json.dumps(config))
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        save_file(tensors[component], root / component / f"{stem}.safetensors")
        half = {name: tensor.half() for name, tensor in tensors[component].items()}
        save_file(half, root / component / f"{stem}.fp16.safetensors")
    scheduler = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).mkdir()
        (root / name / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "a</w>": 1, name: 2}))
        (root / name / "merges.txt").write_text("#version: 0.2\n")
    index = {"_class_name": "StableDiffusionXLPipeline", "_diffusers_version": "0.19.0.dev0", **CLASSES}
    (root / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": True}))
    return root


@pytest.fixture
def small_model(_small_model: Path, tmp_path: Path) -> Path:
    """A diffusers folder of the model, with plain and fp16 files, to spoil at will."""
    return Path(shutil.copytree(_small_model, tmp_path / _small_model.name))


@pytest.fixture
def small_refiner(small_model: Path, edit: Callable[..., None]) -> Path:
    """The model's folder as that of a refiner: the second text encoder alone, and a UNet of its own."""
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(small_model / name)
        edit(small_model / "model_index.json", **{name: [None, None]})
    edit(small_model / "model_index.json", requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)
    edit(small_model / "unet/config.json", cross_attention_dim=40, projection_class_embeddings_input_dim=32 + 5 * 8)
    config = configs.clean(json.loads((small_model / "unet/config.json").read_text()))
    for suffix, dtype in (("", "float32"), (".fp16", "float16")):
        unet = dict(random_weights.load("unet", config, 2, dtype))
        save_file(unet, small_model / f"unet/diffusion_pytorch_model{suffix}.safetensors")
    return small_model


@pytest.fixture
def edit() -> Callable[..., None]:
    """``edit(file, key=value)`` changes a JSON file's keys."""

    def change(path: Path, **values: Any) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the memo of digests nor the hub's cache of the machine are used, nor is its network."""
    from huggingface_hub import constants

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _replace(name: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


_UNET = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_out", "out.2"),
    ("mid_block.attentions.0.", "middle_block.1."),
    *((f"mid_block.resnets.{j}.", f"middle_block.{2 * j}.") for j in range(2)),
    *((f"down_blocks.{i}.downsamplers.0.conv.", f"input_blocks.{3 * i + 3}.0.op.") for i in range(2)),
    *((f"up_blocks.{i}.upsamplers.0.conv.", f"output_blocks.{3 * i + 2}.2.conv.") for i in range(2)),
    *((f"down_blocks.{i}.resnets.{j}.", f"input_blocks.{3 * i + j + 1}.0.") for i in range(3) for j in range(2)),
    *((f"down_blocks.{i}.attentions.{j}.", f"input_blocks.{3 * i + j + 1}.1.") for i in range(3) for j in range(2)),
    *((f"up_blocks.{i}.resnets.{j}.", f"output_blocks.{3 * i + j}.0.") for i in range(3) for j in range(3)),
    *((f"up_blocks.{i}.attentions.{j}.", f"output_blocks.{3 * i + j}.1.") for i in range(3) for j in range(3)),
]
_RESNET = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
]
_VAE = [
    ("conv_norm_out", "norm_out"),
    ("conv_shortcut", "nin_shortcut"),
    *((f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.") for i in range(2)),
    *((f"down_blocks.{i}.resnets.", f"down.{i}.block.") for i in range(4)),
    *((f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.") for i in range(4)),
    *((f"up_blocks.{i}.resnets.", f"up.{3 - i}.block.") for i in range(4)),
    *((f"up_blocks.{i}.upsamplers.0.", f"up.{3 - i}.upsample.") for i in range(4)),
    ("mid_block.attentions.0.", "mid.attn_1."),
    ("group_norm", "norm"),
    *((f"to_{x}.", f"{x}.") for x in "qkv"),
    ("to_out.0", "proj_out"),
]
_OPEN_CLIP = [
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    ("self_attn", "attn"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
]


def original_names(tensors: dict[str, Tensors]) -> Tensors:
    """The model as the original code stores it: one dict, its names, fused q/k/v, 1x1 convolutions in the VAE."""
    out: Tensors = {}
    for name, tensor in tensors["unet"].items():
        pairs = _UNET + (_RESNET if ".resnets." in name else [])
        out[f"model.diffusion_model.{_replace(name, pairs)}"] = tensor
    for name, tensor in tensors["vae"].items():
        if ".attentions.0." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        out[f"first_stage_model.{_replace(name, _VAE)}"] = tensor
    for name, tensor in tensors["text_encoder"].items():
        out[f"conditioner.embedders.0.transformer.{name}"] = tensor
    out["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    prefix = "conditioner.embedders.1.model."
    second = tensors["text_encoder_2"]
    for name, tensor in second.items():
        if name == "text_projection.weight":
            out[f"{prefix}text_projection"] = tensor.T
        elif ".q_proj." in name:
            fused = [second[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            joined = re.sub(r"q_proj\.(weight|bias)", r"in_proj_\1", name)
            out[prefix + _replace(joined, _OPEN_CLIP)] = torch.cat(fused)
        elif ".k_proj." not in name and ".v_proj." not in name:
            out[prefix + _replace(name, _OPEN_CLIP)] = tensor
    out[f"{prefix}logit_scale"] = torch.tensor(4.6)
    return {name: tensor.contiguous() for name, tensor in out.items()}


@pytest.fixture(scope="session")
def original(tensors: dict[str, Tensors]) -> Tensors:
    """The model's tensors under their original names."""
    return original_names(tensors)


@pytest.fixture(scope="session")
def as_original() -> Callable[[dict[str, Tensors]], Tensors]:
    """The function that gives any model's tensors their original names."""
    return original_names
