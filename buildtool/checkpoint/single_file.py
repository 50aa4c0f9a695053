"""Single-file SDXL checkpoints in the original (LDM/SGM) naming, read under diffusers' names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from buildtool.checkpoint import checks, configs, digests, folder
from buildtool.checkpoint.configs import COMPONENTS, Config
from buildtool.checkpoint.files import Header, Shapes, read_header
from buildtool.checkpoint.folder import Part, Parts, count
from buildtool.store.errors import SdxlError

if TYPE_CHECKING:
    import torch

    from buildtool.checkpoint.tensors import Getter

_UNET = "model.diffusion_model."
_CLIP = "conditioner.embedders.0.transformer."
_OPEN_CLIP = "conditioner.embedders.1.model."
_VAES = ("first_stage_model.", "vae.")
_PREFIXES = {"unet": (_UNET,), "text_encoder": (_CLIP,), "text_encoder_2": (_OPEN_CLIP,), "vae": _VAES}

# Original names of the tensors that `checks.check_shapes` looks at.
_TELLTALES = {
    "input_blocks.0.0.weight": "conv_in.weight",
    "label_emb.0.0.weight": "add_embedding.linear_1.weight",
    "out.2.weight": "conv_out.weight",
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ),
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
}


def read(path: Path, config_dir: Path | None, progress: digests.Progress | None = None) -> Parts:
    """Reads a single-file checkpoint: its header, and configs and tokenizers from elsewhere.

    Args:
        path: the .safetensors file.
        config_dir: a diffusers folder with configs and tokenizers; by default SDXL base's, from the hub's cache.
        progress: see `digests.Progress`.

    Raises:
        SdxlError: not an SDXL checkpoint (and what it is instead), damaged, or not fitting the configs.
    """
    header = read_header(path)
    _check_kind(path, header)
    if config_dir is None:
        from buildtool.checkpoint import hub

        config_dir = hub.config_snapshot()
    index = configs.read_json(config_dir / "model_index.json")
    digest = digests.of_file(path, progress)
    parts = {}
    for component in COMPONENTS:
        class_name = str((index.get(component) or [""])[-1])
        config = configs.read_component(config_dir, component, class_name)
        checks.check_shapes(str(path), component, config, _telltales(component, header.shapes))
        parts[component] = _part(path, component, config, digest, header)
    where = f"{path} with the configs of {config_dir}"
    checks.check_unet_config(where, parts["unet"].config)
    checks.check_fit(where, {name: part.config for name, part in parts.items()})
    scheduler = configs.read_component(config_dir, "scheduler", str((index.get("scheduler") or [""])[-1]))
    tokenizers = folder.read_tokenizers({name: config_dir / name for name in folder.TOKENIZERS}, str(config_dir))
    return Parts(parts, _scheduler(scheduler, header), folder.pipeline_config(index), tokenizers)


def _scheduler(config: Config, header: Header) -> Config:
    # The convention of v-prediction fine-tunes: empty tensors of these names mark the file.
    if "v_pred" in header.shapes:
        config = {**config, "prediction_type": "v_prediction"}
    if "ztsnr" in header.shapes:
        config = {**config, "rescale_betas_zero_snr": True}
    return config


def _check_kind(path: Path, header: Header) -> None:
    """Refuses, by name, what is not a whole SDXL base checkpoint."""
    shapes = header.shapes
    hint = "Only SDXL checkpoints can be built."
    has = {name: any(key.startswith(prefixes) for key in shapes) for name, prefixes in _PREFIXES.items()}
    conv_in = shapes.get(f"{_UNET}input_blocks.0.0.weight", ())
    text = _shape_ending(shapes, "transformer_blocks.0.attn2.to_k.weight")
    channels = conv_in[1] if len(conv_in) == 4 else 0

    kind = ""
    if any(name.startswith("cond_stage_model.") for name in shapes):
        width = text[1] if len(text) == 2 else 0
        kind = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}.get(width, "Stable Diffusion 1.x or 2.x")
    elif any(name.startswith("conditioner.embedders.0.model.") for name in shapes):
        kind, hint = "an SDXL refiner", "Give it as a diffusers folder or by its hub id."
    elif any(name.startswith("edm_") for name in shapes):
        kind = "an SDXL variant of EDM's noise scheme (Playground v2.5, CosXL)"
    elif "scaled_fp8" in shapes:
        kind = "an SDXL checkpoint in scaled fp8"
        hint = "Give the fp16 file."
    elif channels in (8, 9):
        kind = f"an SDXL {'inpainting' if channels == 9 else 'InstructPix2Pix'} model ({channels} input channels)"
    elif any(".time_embed.cond_proj." in name or ".time_embedding.cond_proj." in name for name in shapes):
        kind = "a latent consistency model (its time embedding takes the guidance)"
    elif not conv_in or f"{_UNET}label_emb.0.0.weight" not in shapes:
        kind = checks.identify(shapes) or "no SDXL checkpoint (it has no SDXL UNet in it)"
    if kind:
        raise SdxlError(f"{path} is {kind}.", hint)
    missing = [name for name in COMPONENTS if not has[name]]
    if missing:
        raise SdxlError(f"{path} lacks its {', '.join(missing)}: only whole checkpoints can be built.")


def _shape_ending(shapes: Shapes, ending: str) -> tuple[int, ...]:
    return next((shape for name, shape in shapes.items() if name.endswith(ending)), ())


def _telltales(component: str, shapes: Shapes) -> Shapes:
    """The component's tensors, those that are checked under diffusers' or transformers' names."""
    found: Shapes = {}
    for name, shape in shapes.items():
        prefix = next((p for p in _PREFIXES[component] if name.startswith(p)), None)
        if prefix is None:
            continue
        inner = name.removeprefix(prefix)
        if component == "text_encoder_2":
            inner = re.sub(r"^transformer\.resblocks\.", "encoder.layers.", inner)
            if inner == "text_projection":
                inner, shape = "text_projection.weight", shape[::-1]
        found[inner if component == "vae" else _TELLTALES.get(inner, inner)] = shape
    return found


def _part(path: Path, component: str, config: Config, digest: str, header: Header) -> Part:
    def load() -> Mapping[str, torch.Tensor]:
        from buildtool.checkpoint import tensors

        getters = {
            name: getter
            for name, getter in tensors.file_getters((path,)).items()
            if name.startswith(_PREFIXES[component])
        }
        converted = convert(component, config, getters, header.shapes)
        shapes = {name: value.shape for name, value in converted.items()}
        return tensors.fit(str(path), component, config, {n: v.get for n, v in converted.items()}, shapes)

    own = {name: shape for name, shape in header.shapes.items() if name.startswith(_PREFIXES[component])}
    return Part(config, digest, count(own), load)


def convert(component: str, config: Config, getters: Mapping[str, Getter], shapes: Shapes) -> dict[str, Recorded]:
    """Runs diffusers' own converter over stand-ins that record what is done to each tensor, and read none.

    Args:
        component: its name.
        config: its clean config.
        getters: the component's tensors by their names in the file.
        shapes: their shapes.
    """
    import torch
    from diffusers.loaders import single_file_utils

    original: Any = single_file_utils
    checkpoint: dict[str, Any] = {
        name: Recorded(torch.empty(shapes[name], device="meta"), getter) for name, getter in getters.items()
    }
    if component == "unet":
        return dict(original.convert_ldm_unet_checkpoint(checkpoint, config))
    if component == "vae":
        return dict(original.convert_ldm_vae_checkpoint(checkpoint, config))
    if component == "text_encoder":
        return dict(original.convert_ldm_clip_checkpoint(checkpoint))
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
    return dict(original.convert_open_clip_checkpoint(model, checkpoint, prefix=_OPEN_CLIP))


class Recorded:
    """Stands in for a tensor while a converter moves names around: `get` reads it and repeats what was done."""

    def __init__(self, meta: torch.Tensor, get: Getter) -> None:
        self._meta = meta
        self.get = get

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._meta.shape)

    @property
    def ndim(self) -> int:
        return self._meta.ndim

    @property
    def T(self) -> Recorded:
        return Recorded(self._meta.T, lambda: self.get().T.contiguous())

    def __getitem__(self, index: Any) -> Recorded:
        return Recorded(self._meta[index], lambda: self.get()[index].contiguous())

    def contiguous(self) -> Recorded:
        return self

    def clone(self) -> Recorded:
        return self

    def detach(self) -> Recorded:
        return self
