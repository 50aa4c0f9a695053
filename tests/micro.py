"""A micro SDXL: every block type of the real one, so small that compiling it takes seconds."""

from pathlib import Path

import torch

from buildtool import models


def write(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with seeded random weights; its tokenizers are tiny's. 64x64 pixels."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    first, second = (CLIPTokenizer.from_pretrained(models.TINY / name) for name in ("tokenizer", "tokenizer_2"))
    text = {
        "vocab_size": len(first),
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "bos_token_id": first.bos_token_id,
        "eos_token_id": 2,
        "pad_token_id": first.pad_token_id,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(16, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.5,
            force_upcast=False,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=16, num_hidden_layers=2, hidden_act="quick_gelu", **text)
        ),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=24, num_hidden_layers=2, hidden_act="gelu", projection_dim=24, **text)
        ),
        tokenizer=first,
        tokenizer_2=second,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            layers_per_block=1,
            attention_head_dim=(1, 2),
            cross_attention_dim=40,
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        _unsettle(part)
    pipeline.save_pretrained(folder)
    return folder


def write_refiner(folder: Path, base: Path, seed: int = 1) -> Path:
    """A refiner of a micro model: a UNet of its own, the base model's other parts, in the layout of SDXL's refiner."""
    from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(seed)
    whole = StableDiffusionXLPipeline.from_pretrained(base, dtype=torch.float32, add_watermarker=False)
    changes = {  # one block, attention in the middle alone: it has to be compiled
        "block_out_channels": (16,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "transformer_layers_per_block": (1,),
        "attention_head_dim": (2,),
        "norm_num_groups": 4,
        "cross_attention_dim": 24,
        "projection_class_embeddings_input_dim": 24 + 5 * 8,
    }
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=whole.vae,
        text_encoder=None,
        text_encoder_2=whole.text_encoder_2,
        tokenizer=None,
        tokenizer_2=whole.tokenizer_2,
        unet=UNet2DConditionModel.from_config({**whole.unet.config, **changes}),
        scheduler=whole.scheduler,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    _unsettle(pipeline.unet)
    pipeline.save_pretrained(folder)
    return folder


def _unsettle(part: torch.nn.Module) -> None:
    for parameter in part.parameters():
        if parameter.ndim == 1:  # norms and biases start at ones and zeros, which would hide mistakes
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
