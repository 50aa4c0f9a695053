"""The architecture of the tiny model: SDXL's components, SDXL's wiring, small widths.

Everything that SDXL's pipeline relies on is here in SDXL's own form: two CLIP text encoders of which
the penultimate states are used, the second one's projection as the pooled condition, size and crop
micro-conditioning through `text_time`, linear projections in the transformers, an 8x KL autoencoder with a
`scaling_factor`, and the scaled-linear Euler schedule. Only widths and depths differ.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

VOCAB_SIZE = 1024
TOKENS = 77
TEXT_WIDTH = 128
TEXT_WIDTH_2 = 160
TIME_IDS_DIM = 32

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 4 * TEXT_WIDTH,
    "projection_dim": TEXT_WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": VOCAB_SIZE - 2,
    # 2 is what SDXL's own configs say: transformers then pools at the highest token id, which is <|endoftext|>.
    "eos_token_id": 2,
    "pad_token_id": VOCAB_SIZE - 1,
}
TEXT_ENCODER_2: dict[str, Any] = {
    **TEXT_ENCODER,
    "hidden_size": TEXT_WIDTH_2,
    "intermediate_size": 4 * TEXT_WIDTH_2,
    "projection_dim": TEXT_WIDTH_2,
    "num_attention_heads": 5,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}
UNET: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [64, 96, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 3, 3],  # as in SDXL's config: the number of heads, in spite of the name
    "norm_num_groups": 16,
    "use_linear_projection": True,
    "cross_attention_dim": TEXT_WIDTH + TEXT_WIDTH_2,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_IDS_DIM,
    "projection_class_embeddings_input_dim": TEXT_WIDTH_2 + 6 * TIME_IDS_DIM,
}
REFINER: dict[str, Any] = {
    **UNET,
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 1],
    "attention_head_dim": [1, 2, 3],
    "cross_attention_dim": TEXT_WIDTH_2,
    "projection_class_embeddings_input_dim": TEXT_WIDTH_2 + 5 * TIME_IDS_DIM,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": [32, 48, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "sample_size": 256,
    "scaling_factor": 1.0,
    "force_upcast": False,
}
VAE_TINY: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "encoder_block_out_channels": [32, 32, 32, 32],
    "decoder_block_out_channels": [32, 32, 32, 32],
    "num_encoder_blocks": [1, 2, 2, 2],
    "num_decoder_blocks": [2, 2, 2, 1],
    "scaling_factor": 1.0,
    "force_upcast": False,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}


@dataclass
class Parts:
    """Every network of the tiny model. All float32 while training; stored as float16."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    vae_tiny: AutoencoderTiny
    refiner: UNet2DConditionModel

    def items(self) -> list[tuple[str, torch.nn.Module]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]

    def to(self, device: torch.device | str) -> Parts:
        for _, module in self.items():
            module.to(device)
        return self


def build(seed: int = 0) -> Parts:
    """All networks with seeded random weights, float32, on the CPU, in eval mode."""
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = Parts(
            text_encoder=CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2)),
            unet=UNet2DConditionModel(**UNET),
            vae=AutoencoderKL(**VAE),
            vae_tiny=AutoencoderTiny(**VAE_TINY),
            refiner=UNet2DConditionModel(**REFINER),
        )
    for name, module in parts.items():
        module.eval()
        if name in ("unet", "refiner", "vae"):
            _start_plain(module)
    with torch.no_grad():
        # Latents start nearly without noise, or the decoder's first lesson is to ignore them.
        parts.vae.quant_conv.weight[4:].zero_()
        parts.vae.quant_conv.bias[4:].fill_(-5.0)
    return parts


def _start_plain(module: torch.nn.Module) -> None:
    """Let every residual branch start at zero: a deep network then begins as a shallow one, and learns far faster."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for part in module.modules():
        last = None
        if isinstance(part, ResnetBlock2D):
            last = part.conv2
        elif isinstance(part, Transformer2DModel):
            last = part.proj_out
        elif isinstance(part, Attention) and part.residual_connection:
            last = part.to_out[0]
        if last is not None:
            torch.nn.init.zeros_(last.weight)
            torch.nn.init.zeros_(last.bias)


def save(parts: Parts, folder: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write `parts` as a diffusers folder; `folder/tokenizer` and `folder/tokenizer_2` come from `tokens.write`.

    The refiner's folder holds its UNet alone: its tokenizer, text encoder, VAE and scheduler are the base's, and a
    caller passes them (see `docs/tiny-model.md`). The weights of `parts` are left as they are.
    """
    from diffusers import EulerDiscreteScheduler

    _write_networks(parts, folder, dtype)
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    stated = {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
    _write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "EulerDiscreteScheduler", **stated})
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    _write_json(
        folder / "refiner" / "model_index.json",
        {
            "_class_name": "StableDiffusionXLImg2ImgPipeline",
            "force_zeros_for_empty_prompt": False,
            "requires_aesthetics_score": True,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": [None, None],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": [None, None],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )


def load(parts: Parts, folder: Path) -> None:
    """Give `parts` the weights that `save` wrote, and the VAE its `scaling_factor`; the refiner stays as it is.

    Raises:
        FileNotFoundError: the folder lacks a network.
    """
    from safetensors.torch import load_file

    for name, module in parts.items():
        if name == "refiner":
            continue
        file = "model.safetensors" if name.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
        wanted = module.state_dict()
        found = {key: value.float() for key, value in load_file(folder / name / file).items()}
        found = {key if key in wanted else key.removeprefix("text_model."): value for key, value in found.items()}
        stays = {key: value for key, value in wanted.items() if key.endswith("position_ids")}
        module.load_state_dict({**stays, **found})
    stated = json.loads((folder / "vae" / "config.json").read_text())
    parts.vae.register_to_config(scaling_factor=stated["scaling_factor"])


def base_files(folder: Path) -> list[Path]:
    """The files of the base model in `folder`: without the refiner and the small autoencoder."""
    extra = {"refiner", "vae_tiny"}
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] not in extra
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _write_networks(parts: Parts, folder: Path, dtype: torch.dtype) -> None:
    """Each network's config and one safetensors file, contiguous, in `dtype`."""
    from safetensors.torch import save_file

    for name, module in parts.items():
        place = folder / {"refiner": "refiner/unet"}.get(name, name)
        text = name.startswith("text_encoder")
        # Every transformers reads the names with this prefix; version 5 alone writes them without.
        prefix = "text_model." if text else ""
        tensors = {
            (key if key.startswith(("text_model.", "text_projection.")) else prefix + key): value.to(dtype).contiguous()
            for key, value in module.state_dict().items()
            if not key.endswith("position_ids")
        }
        place.mkdir(parents=True, exist_ok=True)
        file = place / ("model.safetensors" if text else "diffusion_pytorch_model.safetensors")
        save_file({key: value.cpu() for key, value in tensors.items()}, file, metadata={"format": "pt"})
        file.chmod(0o644)
        if text:
            stated = {"text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER_2}[name]
            # "dtype" is what transformers loads into when nobody says; diffusers' own default is float32 too.
            config = {**stated, "model_type": "clip_text_model", "architectures": [type(module).__name__]}
            config |= {"dtype": "float32", "attention_dropout": 0.0, "dropout": 0.0, "initializer_range": 0.02}
        else:
            stated = dict(cast("Any", module).config)
            config = {key: value for key, value in stated.items() if not key.startswith("_")}
            config["_class_name"] = type(module).__name__
            if name == "vae_tiny":
                config.pop("block_out_channels", None)  # AutoencoderTiny notes it down, and warns when it is given
        _write_json(place / "config.json", config)
