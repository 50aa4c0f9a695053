"""Resolves ``--model`` and ``--vae`` to a `Source`: what is in the key, and tensors when they are wanted.

Resolving reads configs, tokenizers and the headers of weights files, imports no torch, and reads no
tensor: on a cache hit nothing more happens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from buildtool.checkpoint import checks, configs, folder, random_weights
from buildtool.checkpoint.configs import COMPONENTS, Config
from buildtool.checkpoint.digests import Progress
from buildtool.checkpoint.folder import Part, Parts
from buildtool.store.errors import SdxlError

if TYPE_CHECKING:
    import torch

DATA = Path(__file__).parent / "data"
TINY = DATA / "tiny"
SDXL_BASE = DATA / "sdxl-base"
REFINER = "refiner"
"""Folder beside a shipped model's components with its refiner's UNet; all else of the refiner is the model's."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_VAE_IDS = {"fp16-fix": "madebyollin/sdxl-vae-fp16-fix", "tiny": "madebyollin/taesdxl"}
# A full-size random model is fp16, as the published variants are: half the disk and half the time.
_SHIPPED = {"tiny": TINY, "tiny-refiner": TINY / REFINER}
_RANDOM = {
    "sdxl-base": (SDXL_BASE, "float16"),
    "sdxl-refiner": (SDXL_BASE / REFINER, "float16"),
    "tiny": (TINY, "float32"),
    "tiny-refiner": (TINY / REFINER, "float32"),
}
# Of the full-size architecture; a test counts them on the modules themselves.
_SDXL_PARAMETERS = {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480}
_SDXL_PARAMETERS |= {"text_encoder_2": 694_659_840, "AutoencoderTiny": 2_445_063, "sdxl-refiner unet": 2_259_526_660}


@dataclass(frozen=True)
class Source:
    """A resolved checkpoint.

    Attributes:
        name: its folder's name in the store, ``[a-z0-9._-]+``.
        model: as asked.
        revision: the commit of a hub model, else "".
        variant: as asked, else "".
        vae: as asked.
        configs: clean configs (private keys dropped, ``_class_name`` kept, the classes' defaults spelled out) of
            the components and the scheduler; ``pipeline`` is the rest of model_index.json.
        parameters: component -> how many numbers it has.
        weights: component -> sha256 of its source weights (of a single file, that of the file).
        tokenizers: ``tokenizer`` and ``tokenizer_2`` -> sha256 of their files.
        tokenizer_folders: where those files are.
        default_size: the model's own (width, height), in pixels.
    """

    name: str
    model: str
    revision: str
    variant: str
    vae: str
    configs: dict[str, Config]
    weights: dict[str, str]
    parameters: dict[str, int]
    tokenizers: dict[str, str]
    tokenizer_folders: dict[str, Path]
    default_size: tuple[int, int]
    _parts: Mapping[str, Part] = field(repr=False, compare=False)

    def tensors(self, component: str) -> Mapping[str, torch.Tensor]:
        """A component's state dict, under the names that diffusers-format files have.

        Those are the modules' own names, but for ``text_encoder`` with transformers from 5.6, whose
        CLIPTextModel dropped the ``text_model.`` that files have. Each tensor is read (or made) when it is
        asked for, on the CPU, in the checkpoint's dtype. Imports torch and the library that defines the component.

        Raises:
            SdxlError: names or shapes are not those that the config describes.
        """
        return self._parts[component].load()


def resolve(
    model: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str = "default",
    config_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Source:
    """Resolves a checkpoint.

    Args:
        model: a hub id, a diffusers folder, a single .safetensors file, ``tiny``, or
            ``random:sdxl-base[:SEED]`` (the tokenizers of which are tiny's: no CLIP vocabulary is shipped, so
            its prompts mean nothing; it is for measuring) and ``random:tiny[:SEED]``; of each, the refiner:
            ``tiny-refiner``, ``random:sdxl-refiner[:SEED]``, ``random:tiny-refiner[:SEED]``.
        revision: of a hub model: branch, tag or commit.
        variant: such as ``fp16``, of a hub model or a folder.
        vae: ``default``, ``fp16-fix``, ``tiny``, a hub id or a folder.
        config_dir: a diffusers folder with configs and tokenizers for a single file.
        progress: called as ``progress(what, done, total)`` while a file is hashed.

    Raises:
        SdxlError: not there, not SDXL, incomplete or damaged.
    """
    path = Path(model).expanduser()
    shipped = model in _SHIPPED or model.startswith("random:")
    local = shipped or path.exists()
    if local and revision:
        raise SdxlError(f"--revision is for hub models; {model} is not one.", "Leave it out.")
    if variant and (shipped or path.is_file()):
        raise SdxlError(f"--variant is for hub models and folders; {model} is neither.", "Leave it out.")
    if config_dir is not None and not (path.is_file() and not shipped):
        raise SdxlError(f"--config is for a single .safetensors file; {model} is none.", "Leave it out.")

    commit = ""
    if model.startswith("random:"):
        found = _random(model)
    elif model in _SHIPPED:
        found = folder.read(_SHIPPED[model], "", model, progress, TINY)
    elif path.is_dir():
        found = folder.read(_model_root(path), variant or "", progress=progress)
    elif path.exists():
        from buildtool.checkpoint import single_file

        found = single_file.read(path, Path(config_dir) if config_dir else None, progress)
    elif _HUB_ID.fullmatch(model) and not model.endswith((".safetensors", ".ckpt", ".bin")):
        from buildtool.checkpoint import hub

        snapshot = hub.snapshot(model, revision, variant or "")
        commit = snapshot.name
        found = folder.read(snapshot, variant or "", model, progress)
    else:
        raise SdxlError(
            f"{model} does not exist.", "Give a hub id (owner/name), a diffusers folder or a .safetensors file."
        )

    if vae != "default":
        found = replace(found, parts={**found.parts, "vae": _vae(vae, model, found, progress)})
        checks.check_fit(f"{model} with --vae {vae}", {name: part.config for name, part in found.parts.items()})
    return _source(found, _name(model, path), model, commit, variant or "", vae)


def _source(found: Parts, name: str, model: str, commit: str, variant: str, vae: str) -> Source:
    components = [component for component in COMPONENTS if component in found.parts]
    all_configs = {component: found.parts[component].config for component in components}
    size = all_configs["unet"]["sample_size"] or 128
    height, width = size if isinstance(size, list) else (size, size)
    factor = configs.vae_scale_factor(all_configs["vae"])
    return Source(
        name=name,
        model=model,
        revision=commit,
        variant=variant,
        vae=vae,
        configs={**all_configs, "scheduler": found.scheduler, "pipeline": found.pipeline},
        weights={component: found.parts[component].digest for component in components},
        parameters={component: found.parts[component].parameters for component in components},
        tokenizers={key: folder.tokenizer_digest(path) for key, path in found.tokenizers.items()},
        tokenizer_folders=dict(found.tokenizers),
        default_size=(width * factor, height * factor),
        _parts=found.parts,
    )


def _name(model: str, path: Path) -> str:
    if path.is_file() and not model.startswith("random:"):
        model = path.stem
    elif path.is_dir() and model not in _SHIPPED:
        model = path.resolve().name
    slug = re.sub("[^a-z0-9._-]+", "-", model.replace("/", "--").lower()).strip("-.")
    return slug or "model"


def _model_root(path: Path) -> Path:
    if (path / "model_index.json").exists():
        return path
    if (path / "config.json").exists():
        kind = configs.read_json(path / "config.json").get("_class_name") or "one component"
        hint = f"Try --model {path.parent}." if (path.parent / "model_index.json").exists() else "Give a whole model."
        raise SdxlError(f"{path} is {kind}, not a model (no model_index.json).", hint)
    files = sorted(p.name for p in path.glob("*.safetensors"))
    hint = f"For its file: --model {path / files[0]}" if files else "Give the folder that holds it."
    raise SdxlError(f"{path} is no diffusers folder (no model_index.json).", hint)


def _random(model: str) -> Parts:
    _, base, *rest = model.split(":")
    if base not in _RANDOM or len(rest) > 1 or (rest and not rest[0].isdigit()):
        raise SdxlError(f"{model} is not known.", f"Try random:{' or random:'.join(_RANDOM)}, or random:tiny:SEED.")
    root, dtype = _RANDOM[base]
    seed = int(rest[0]) if rest else 0
    index = configs.read_json(root / "model_index.json")
    parts = {}
    for component in folder.components(index):
        config = configs.read_component(_beside(root, component), component, str(index[component][-1]))
        parts[component] = _random_part(base, component, config, seed, dtype)
    scheduler = configs.read_component(_beside(root, "scheduler"), "scheduler", str(index["scheduler"][-1]))
    tokenizers = {name: TINY / name for name in folder.tokenizers(index)}
    return Parts(parts, scheduler, folder.pipeline_config(index), folder.read_tokenizers(tokenizers, model))


def _beside(root: Path, component: str) -> Path:
    """The folder that has a component: a shipped model's, or the one that its refiner's lies in."""
    return folder.place(root, component, root.parent).parent


def _random_part(base: str, component: str, config: Config, seed: int, dtype: str) -> Part:
    def load() -> Mapping[str, torch.Tensor]:
        return random_weights.load(component, config, seed, dtype)

    if base.startswith("tiny"):
        place = _beside(_RANDOM[base][0], component) / component
        parameters = folder.read_part(place, component, "", config["_class_name"]).parameters
    else:
        other = "AutoencoderTiny" if config["_class_name"] == "AutoencoderTiny" else f"{base} {component}"
        parameters = _SDXL_PARAMETERS.get(other) or _SDXL_PARAMETERS[component]
    return Part(config, random_weights.digest(component, config, seed, dtype), parameters, load)


def _vae(vae: str, model: str, found: Parts, progress: Progress | None) -> Part:
    small = model in _SHIPPED or model.startswith("random:tiny")
    if small and vae == "fp16-fix":
        raise SdxlError("--vae fp16-fix is for SDXL's latents; the tiny model has its own.", "Leave --vae out.")
    if small and vae == "tiny":
        return folder.read_part(TINY / "vae_tiny", "vae", "", "AutoencoderTiny", progress)
    if model.startswith("random:") and vae in _VAE_IDS:
        # Same architectures as the published ones, so the same speed; no download for random weights.
        config = {**found.parts["vae"].config, "force_upcast": False}
        if vae == "tiny":
            config = configs.clean(configs.read_json(SDXL_BASE / "vae_tiny" / "config.json"))
        return _random_part("sdxl-base", "vae", config, 0, "float16")
    path = Path(vae).expanduser()
    if path.is_dir():
        return _vae_folder(path, progress)
    if path.is_file():
        raise SdxlError(f"--vae {vae} is a file.", "Give its folder (config.json beside it), or a hub id.")
    repo = _VAE_IDS.get(vae, vae)
    if not _HUB_ID.fullmatch(repo):
        raise SdxlError(f"--vae {vae} does not exist.", "Give default, fp16-fix, tiny, a hub id or a folder.")
    from buildtool.checkpoint import hub

    return _vae_folder(hub.vae_snapshot(repo), progress)


def _vae_folder(path: Path, progress: Progress | None) -> Part:
    inner = path / "vae" if not (path / "config.json").exists() and (path / "vae").is_dir() else path
    name = str(configs.read_json(inner / "config.json").get("_class_name", ""))
    if name not in ("AutoencoderKL", "AutoencoderTiny"):
        raise SdxlError(f"--vae {path} is {name or 'of no class'}, not an AutoencoderKL or AutoencoderTiny.")
    return folder.read_part(inner, "vae", "", name, progress)
