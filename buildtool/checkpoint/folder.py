"""Diffusers folders: on disk, or a snapshot in the hub's cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from buildtool.checkpoint import checks, configs, digests
from buildtool.checkpoint.configs import COMPONENTS, Config
from buildtool.checkpoint.files import Shapes, WeightFiles, find_weights, variants
from buildtool.store.errors import SdxlError

if TYPE_CHECKING:
    import torch

Loader = Callable[[], Mapping[str, "torch.Tensor"]]


@dataclass(frozen=True)
class Part:
    """One component with weights: its clean config, its weights' digest and size, and how to read them."""

    config: Config
    digest: str
    parameters: int
    load: Loader = field(repr=False, compare=False)


@dataclass(frozen=True)
class Parts:
    """A whole model, however it was stored."""

    parts: dict[str, Part]
    scheduler: Config
    pipeline: Config
    tokenizers: dict[str, Path]


TOKENIZERS = ("tokenizer", "tokenizer_2")
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)


def read(
    root: Path, variant: str, where: str = "", progress: digests.Progress | None = None, others: Path | None = None
) -> Parts:
    """Reads a diffusers folder: its configs, and the names and shapes of its tensors.

    Args:
        root: the folder with model_index.json.
        variant: such as ``fp16``; "" for the plain files.
        where: what to call it in messages; the folder by default.
        progress: see `digests.Progress`.
        others: the folder that has what model_index.json names and ``root`` has not.

    Raises:
        SdxlError: not SDXL, something missing, damaged, or not fitting.
    """
    where = where or str(root)
    index = check_kind(root, where)
    named, wanted = _named(index), components(index)
    for name in (*wanted, *tokenizers(index), "scheduler"):
        if name not in named or not place(root, name, others).is_dir():
            what = "its model_index.json names none" if name not in named else f"{root / name} is not there"
            raise SdxlError(f"{where} lacks its {name}: {what}.", "Download the whole model again.")
    _check_variant(where, root, variant)
    parts = {}
    for name in wanted:
        parts[name] = read_part(place(root, name, others), name, variant, str(named[name][-1]), progress)
    checks.check_fit(where, {name: part.config for name, part in parts.items()})
    return Parts(
        parts,
        configs.read_component(place(root, "scheduler", others).parent, "scheduler", str(named["scheduler"][-1])),
        pipeline_config(index),
        read_tokenizers({name: place(root, name, others) for name in tokenizers(index)}, where),
    )


def place(root: Path, name: str, others: Path | None) -> Path:
    """The folder of a component or tokenizer."""
    return others / name if others is not None and not (root / name).is_dir() else root / name


def components(index: Config) -> tuple[str, ...]:
    """The components with weights that a model of this model_index.json has."""
    return tuple(name for name in COMPONENTS if name != "text_encoder" or not is_refiner(index))


def tokenizers(index: Config) -> tuple[str, ...]:
    """Its tokenizers."""
    return TOKENIZERS[1:] if is_refiner(index) else TOKENIZERS


def is_refiner(index: Config) -> bool:
    """Whether model_index.json has a refiner's layout: the second text encoder alone."""
    named = _named(index)
    return "text_encoder_2" in named and "text_encoder" not in named


def check_kind(root: Path, where: str) -> Config:
    """Reads model_index.json, and refuses by name what is not SDXL; needs no weights."""
    index = configs.read_json(root / "model_index.json")
    named = _named(index)
    unet: Config = {}
    if "unet" in named and (root / "unet").is_dir():
        unet = configs.read_component(root, "unet", "UNet2DConditionModel")
    scored = bool(index.get("requires_aesthetics_score", False))
    checks.check_pipeline(where, str(index.get("_class_name", "")), unet, is_refiner(index), scored)
    return index


def is_sdxl(root: Path) -> bool:
    """Whether `check_kind` lets it pass."""
    try:
        check_kind(root, str(root))
    except SdxlError:
        return False
    return True


def _named(index: Config) -> dict[str, list[str]]:
    """The components that model_index.json has; optional ones that are absent are [null, null] there."""
    return {name: value for name, value in index.items() if isinstance(value, list) and value and all(value)}


def pipeline_config(index: Config) -> Config:
    """What model_index.json says beside naming components."""
    said = {k: v for k, v in index.items() if not k.startswith("_") and not isinstance(v, list)}
    return {"force_zeros_for_empty_prompt": True, **said}


def _check_variant(where: str, root: Path, variant: str) -> None:
    there = sorted({v for name in COMPONENTS for v in variants(root / name)})
    if variant and variant not in there:
        have = f"it has {', '.join(there)}" if there else "it has none"
        raise SdxlError(f"{where} has no files of the variant {variant!r}; {have}.", "Leave --variant out.")


def read_part(
    folder: Path, component: str, variant: str, class_name: str = "", progress: digests.Progress | None = None
) -> Part:
    """One component of a diffusers folder: its config checked against the headers of its weights.

    Raises:
        SdxlError: no config, no weights, damaged ones, or ones that do not fit the config.
    """
    config = configs.clean(configs.read_json(folder / "config.json"), class_name)
    weights = find_weights(folder, variant)
    if weights is None:
        there = variants(folder)
        hint = f"Add --variant {there[0]}." if there else "Download it again."
        only = f" for --variant {variant}" if variant else f" but those of {', '.join(there)}" if there else ""
        raise SdxlError(f"{folder} has no weights{only}.", hint)
    shapes = merged(weights)
    checks.check_shapes(str(folder), component, config, shapes)

    def load() -> Mapping[str, torch.Tensor]:
        from buildtool.checkpoint import tensors

        return tensors.fit(str(folder), component, config, tensors.file_getters(weights.files), shapes)

    return Part(config, digests.of_files(weights.files, progress), count(shapes), load)


def count(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes.values())


def merged(weights: WeightFiles) -> Shapes:
    """All shapes of a component's shards."""
    shapes: Shapes = {}
    for header in weights.headers().values():
        shapes.update(header.shapes)
    return shapes


def read_tokenizers(folders: Mapping[str, Path], where: str) -> dict[str, Path]:
    """The tokenizers' folders, by name, as they are given.

    Raises:
        SdxlError: one has neither tokenizer.json nor vocab.json and merges.txt.
    """
    for name, folder in folders.items():
        if not has_tokenizer(folder):
            raise SdxlError(
                f"{where} lacks its {name}: {folder} has neither vocab.json and merges.txt nor tokenizer.json."
            )
    return dict(folders)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer's files."""
    old = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return old or (folder / "tokenizer.json").is_file()


def tokenizer_digest(folder: Path) -> str:
    """sha256, as 64 hex digits, of a tokenizer's files."""
    sha = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            sha.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return sha.hexdigest()
