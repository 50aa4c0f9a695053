"""Components' configs: read, cleaned of what doesn't shape a model, with the libraries' defaults spelled out."""

import json
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError

Config = dict[str, Any]

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The components that have weights; a refiner lacks the first text encoder."""

CONFIG_FILES = {"scheduler": "scheduler_config.json"}
"""Component -> its config's file name, where it isn't config.json."""

# What the libraries assume when a config.json doesn't say. Two checkpoints of the same architecture that were saved
# by different versions spell different keys: with the defaults filled in, they share compiled code. A test holds
# this table against the installed libraries.
DEFAULTS: dict[str, Config] = {
    "UNet2DConditionModel": {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "only_cross_attention": False,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-05,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "attention_head_dim": 8,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "use_linear_projection": False,
        "class_embed_type": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "num_class_embeds": None,
        "upcast_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "projection_class_embeddings_input_dim": None,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
        "addition_embed_type_num_heads": 64,
    },
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D"],
        "block_out_channels": [64],
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": [64, 64, 64, 64],
        "decoder_block_out_channels": [64, 64, 64, 64],
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "latent_channels": 4,
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "force_upcast": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    "CLIPTextModel": {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-05,
        "attention_dropout": 0.0,
        "pad_token_id": 1,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "EulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "sigma_min": None,
        "sigma_max": None,
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "steps_offset": 0,
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
}
DEFAULTS["CLIPTextModelWithProjection"] = DEFAULTS["CLIPTextModel"]

# Said by transformers for every kind of model, or only of use in training.
_NOISE = frozenset(
    {
        *("architectures", "model_type", "transformers_version", "dtype", "torch_dtype"),
        *("attention_probs_dropout_prob", "dropout", "gradient_checkpointing"),
        *("initializer_factor", "initializer_range", "problem_type", "id2label", "label2id"),
        *("bad_words_ids", "chunk_size_feed_forward", "is_encoder_decoder"),
        *("output_attentions", "output_hidden_states", "return_dict", "use_cache", "use_return_dict"),
    }
)


def read_json(path: Path) -> Config:
    """A JSON object from a file.

    Raises:
        SdxlError: not there, or not a JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise SdxlError(f"{path} is missing.") from None
    except OSError as error:
        raise SdxlError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise SdxlError(f"{path} is not valid JSON.", "Download it again.") from None
    if not isinstance(value, dict):
        raise SdxlError(f"{path} is not a JSON object.")
    return value


def read_component(root: Path, component: str, class_name: str) -> Config:
    """The clean config of a component below a diffusers folder."""
    return clean(read_json(root / component / CONFIG_FILES.get(component, "config.json")), class_name)


def clean(raw: Config, class_name: str = "") -> Config:
    """A config without private keys, with ``_class_name`` and the class's defaults spelled out."""
    name = str(raw.get("_class_name") or class_name)
    defaults = DEFAULTS.get(name, {})
    said = {key: value for key, value in raw.items() if not key.startswith("_")}
    if name.startswith("CLIP"):
        said = {key: value for key, value in said.items() if key not in _NOISE}
    else:
        said.pop("dtype", None)
        said.pop("torch_dtype", None)
    if name == "AutoencoderTiny":
        said.pop("block_out_channels", None)  # diffusers derives it, and some files repeat it
    if said.get("upcast_attention", False) is None:
        said["upcast_attention"] = False  # SDXL base says null
    return {"_class_name": name, **defaults, **said}


def vae_scale_factor(vae: Config) -> int:
    """Pixels per latent, along each side."""
    channels = vae.get("block_out_channels") or vae.get("decoder_block_out_channels") or []
    return int(2 ** (len(channels) - 1))
