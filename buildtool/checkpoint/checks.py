"""Is it SDXL, and do its parts fit each other? Told from configs and from tensors' shapes; no tensor is read."""

import re
from collections.abc import Mapping

from buildtool.checkpoint.configs import Config
from buildtool.checkpoint.files import Shapes
from buildtool.store.errors import SdxlError

_WANTED = "Only SDXL checkpoints can be built: a hub id, a diffusers folder or a .safetensors file of one."


_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}


def check_pipeline(where: str, class_name: str, unet: Config, refiner: bool, scored: bool) -> None:
    """Refuses, by name, a diffusers folder that is neither an SDXL base model nor a refiner.

    Args:
        where: the folder, for messages.
        class_name: the pipeline's class in model_index.json.
        unet: the UNet's config.
        refiner: whether model_index.json names the second text encoder alone.
        scored: whether it says ``requires_aesthetics_score``.

    Raises:
        SdxlError: another kind of model, or an SDXL kind that isn't served.
    """
    if not class_name.startswith("StableDiffusionXL"):
        width = unet.get("cross_attention_dim")
        kind = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(width if isinstance(width, int) else 0)
        raise SdxlError(
            f"{where} is {f'{kind} ' if kind else ''}({class_name or 'no pipeline class'}), not SDXL.", _WANTED
        )
    if refiner and not scored:
        raise SdxlError(
            f"{where} has no first text encoder, as a refiner, but its model_index.json doesn't say "
            "requires_aesthetics_score, which diffusers wants of one.",
            "A refiner: add it there. Another model: download it again.",
        )
    if unet:
        check_unet_config(where, unet)


def check_class(where: str, component: str, config: Config) -> None:
    """Refuses a component of a class that SDXL doesn't use: the name picks the code that is run."""
    if config["_class_name"] not in _CLASSES[component]:
        wanted = " or ".join(_CLASSES[component])
        raise SdxlError(f"{where}: its {component} is {config['_class_name'] or 'of no class'}, not {wanted}.")


def check_unet_config(where: str, unet: Config) -> None:
    """Refuses a UNet that isn't SDXL base's kind: other conditioning, inpainting, LCM."""
    check_class(where, "unet", unet)
    channels = unet.get("in_channels")
    if unet.get("addition_embed_type") != "text_time":
        raise SdxlError(
            f"{where} is not SDXL: its UNet has cross_attention_dim {unet.get('cross_attention_dim')} "
            "and no size conditioning.",
            _WANTED,
        )
    if channels == 9:
        raise SdxlError(f"{where} is an SDXL inpainting model (9 input channels).", _WANTED)
    if channels == 8:
        raise SdxlError(f"{where} is an SDXL InstructPix2Pix model (8 input channels).", _WANTED)
    if channels != 4 or unet.get("out_channels") != 4:
        raise SdxlError(f"{where} has a UNet of {channels} input channels; SDXL has 4.", _WANTED)
    if unet.get("time_cond_proj_dim") is not None:
        raise SdxlError(
            f"{where} is a latent consistency model (time_cond_proj_dim {unet['time_cond_proj_dim']}), "
            "whose guidance is an input that SDXL's UNet doesn't have.",
            _WANTED,
        )
    for name, plain in (("encoder_hid_dim", None), ("class_embed_type", None), ("attention_type", "default")):
        if unet.get(name, plain) != plain:
            raise SdxlError(f"{where} has a UNet with {name} {unet[name]!r}, which isn't supported.", _WANTED)


def check_fit(where: str, configs: Mapping[str, Config]) -> None:
    """Checks the components' configs against each other.

    Raises:
        SdxlError: widths that do not add up, such as a text encoder of another model.
    """
    unet, vae = configs["unet"], configs["vae"]
    refiner, second = "text_encoder" not in configs, configs["text_encoder_2"]
    widths = [configs[name]["hidden_size"] for name in ("text_encoder", "text_encoder_2") if name in configs]
    embedded, sizes = unet["projection_class_embeddings_input_dim"], unet["addition_time_embed_dim"]
    # Original size, crop and target size; a refiner's: original size, crop and aesthetic score.
    count = 5 if refiner else 6
    if not refiner and embedded == second["projection_dim"] + 5 * sizes:
        raise SdxlError(
            f"{where} has parts that do not fit: its UNet is a refiner's (it reads an aesthetic score), "
            "and it has a first text encoder, which a refiner has not."
        )
    if unet["cross_attention_dim"] != sum(widths):
        raise SdxlError(
            f"{where} has parts that do not fit: the UNet reads text of width {unet['cross_attention_dim']}, "
            f"{'a refiner has one text encoder, which gives' if refiner else 'the text encoders give'} "
            f"{' + '.join(map(str, widths))}."
        )
    if embedded != second["projection_dim"] + count * sizes:
        raise SdxlError(
            f"{where} has parts that do not fit: the UNet reads {embedded} numbers of pooled text and sizes, "
            f"it would get {second['projection_dim']} + {count} x {sizes}."
        )
    if vae["latent_channels"] != unet["in_channels"]:
        raise SdxlError(
            f"{where} has parts that do not fit: the UNet has {unet['in_channels']} latent channels, "
            f"the VAE {vae['latent_channels']}."
        )


def check_shapes(where: str, component: str, config: Config, shapes: Shapes) -> None:
    """Compares a few tell-tale tensors of a component's file with its config.

    Args:
        where: the folder or file, for messages.
        component: unet, vae, text_encoder or text_encoder_2.
        config: its clean config.
        shapes: the file's tensors, by diffusers' or transformers' names.

    Raises:
        SdxlError: it is another kind of file, or of another size than the config says.
    """
    check_class(where, component, config)
    shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
    for name, wanted in _expected(component, config).items():
        if name not in shapes:
            kind = identify(shapes)
            what = f"it looks like {kind}" if kind else f"it has no {name}"
            raise SdxlError(f"{where} does not hold the {component} that its config describes: {what}.")
        if shapes[name] != wanted:
            raise SdxlError(
                f"{where} does not fit its config: {name} is {_spell(shapes[name])}, the config says {_spell(wanted)}."
            )
    if component.startswith("text_encoder"):
        layers = len({found[1] for name in shapes if (found := re.match(r"encoder\.layers\.(\d+)\.", name))})
        if layers != config["num_hidden_layers"]:
            raise SdxlError(
                f"{where} does not fit its config: it has {layers} layers, the config says "
                f"{config['num_hidden_layers']}."
            )


def _expected(component: str, config: Config) -> dict[str, tuple[int, ...]]:
    if component == "unet":
        first, text = config["block_out_channels"][0], config["cross_attention_dim"]
        last = config["block_out_channels"][-1]
        kernel = config["conv_in_kernel"]
        expected = {
            "conv_in.weight": (first, config["in_channels"], kernel, kernel),
            "add_embedding.linear_1.weight": (first * 4, config["projection_class_embeddings_input_dim"]),
            "conv_out.weight": (config["out_channels"], first, config["conv_out_kernel"], config["conv_out_kernel"]),
        }
        if config["mid_block_type"] == "UNetMidBlock2DCrossAttn":
            expected["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] = (last, text)
        return expected
    if component == "vae":
        if config["_class_name"] == "AutoencoderTiny":
            out, latent = config["decoder_block_out_channels"][0], config["latent_channels"]
            return {"decoder.layers.0.weight": (out, latent, 3, 3)}
        return {
            "decoder.conv_in.weight": (config["block_out_channels"][-1], config["latent_channels"], 3, 3),
            "decoder.conv_out.weight": (config["out_channels"], config["block_out_channels"][0], 3, 3),
        }
    width = config["hidden_size"]
    expected = {
        "embeddings.token_embedding.weight": (config["vocab_size"], width),
        "embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    if component == "text_encoder_2":
        expected["text_projection.weight"] = (config["projection_dim"], width)
    return expected


def _spell(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


# The first that matches: (what it is, a pattern that one of its tensors' names matches).
_KINDS = (
    ("a ControlNet", r"(control_model\.|controlnet_cond_embedding\.|controlnet_down_blocks\.|input_hint_block\.)"),
    ("an IP-Adapter", r"(ip_adapter\.|image_proj\.)"),
    ("a LoRA", r"(lora_|lycoris_|.*[._](lora_A|lora_B|lora_up|lora_down|lora)[._]|.*\.(hada_w1_a|lokr_w1|alpha)$)"),
    ("a textual inversion", r"(clip_l|clip_g|emb_params|string_to_param|<.*>)$"),
    ("Stable Diffusion 3", r"(model\.diffusion_model\.)?joint_blocks\."),
    ("Flux", r"(model\.diffusion_model\.)?(double_blocks|single_transformer_blocks)\."),
    ("Stable Diffusion 1.x or 2.x", r"cond_stage_model\."),
    ("Stable Cascade", r"(clip_txt_mapper\.|down_blocks\.\d+\.\d+\.channelwise)"),
    ("a VAE alone", r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|layers\.0)\.weight"),
    ("a UNet alone, in diffusers' names", r"(unet\.)?(conv_in|add_embedding\.linear_1)\.weight"),
    ("a text encoder alone", r"(text_model\.)?embeddings\.token_embedding\.weight"),
)


def identify(shapes: Shapes) -> str:
    """What a file of weights is, from its tensors' names, where it isn't an SDXL checkpoint; "" if unknown."""
    for kind, pattern in _KINDS:
        match = re.compile(pattern).match
        if any(match(name) for name in shapes):
            return kind
    return ""
