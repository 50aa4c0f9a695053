"""The artifact's manifest: typed, validated, and the only thing that chooses a loader."""

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from buildtool.store.errors import SdxlError
from buildtool.store.key import ArtifactKey, canonical_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

Dtype = Literal["float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "uint8", "bool"]
Size = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class FileEntry(_Struct, frozen=True):
    """A file of the artifact; its name is the key in ``Manifest.files``."""

    size: Size
    sha256: Sha256


class TensorSpec(_Struct, frozen=True):
    """An input or output of an engine."""

    name: str
    shape: tuple[Size, ...]
    dtype: Dtype
    stride: tuple[Size, ...]


class StoredTensor(_Struct, frozen=True):
    """A tensor of a weights file: flat there, in physical order; this is the view to rebuild.

    ``sources`` are the checkpoint's tensors that it holds: joined along the first dimension,
    flattened where ``shape`` has one dimension, and zero-padded up to ``shape[0]``. With a ``recipe``, which only
    fp8 has, they are what it was computed of.
    """

    shape: tuple[Size, ...]
    dtype: Dtype
    stride: tuple[Size, ...]
    sources: tuple[str, ...]
    recipe: str = ""


class Check(_Struct, frozen=True):
    """How a variant compared with fp32 eager on the golden tensors."""

    status: Literal["passed", "deferred"]
    error: dict[str, float]
    """Output -> relative error ||out - golden|| / ||golden||; empty when deferred."""
    tolerance: float
    reason: str
    """Why the check was deferred; empty when it passed."""


class Segment(_Struct, frozen=True):
    """A part of a variant that is compiled by itself. Parts hand tensors over by name: an input is the variant's, or
    an output of an earlier part."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, str]


class Variant(_Struct, frozen=True, omit_defaults=True):
    file: str
    """Empty for a variant in segments."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    constants: dict[str, str]
    """The compiled code's own name of a constant -> the stored tensor that it takes."""
    check: Check
    segments: tuple[Segment, ...] = ()
    """In the order in which they run; no two take the same stored tensor."""
    activation_bytes: int = 0
    """What a call takes of a GPU beside weights, by the check at the end of the build; 0 where it is unknown."""

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(part.file for part in self.segments) or (self.file,)


class Component(_Struct, frozen=True):
    loader: str
    """Name in the runtimes' registry."""
    precision: Literal["fp32", "fp16", "bf16", "fp8"]
    """What it computes in; a VAE that is upcast says fp32 in an fp16 artifact."""
    code_key: str
    weights: str
    """File of the artifact that holds the weights; empty for engines that hold their own."""
    tensors: dict[str, StoredTensor]
    variants: dict[str, Variant]


class PipelineConfig(_Struct, frozen=True):
    """What the loop around the engines has to know of the model."""

    force_zeros_for_empty_prompt: bool
    latent_channels: int
    vae_scale_factor: int
    scaling_factor: float
    latents_mean: tuple[float, ...] | None
    latents_std: tuple[float, ...] | None
    max_prompt_tokens: int


class Manifest(_Struct, frozen=True):
    schema_version: int
    key: ArtifactKey
    key_digest: Sha256
    created: str
    """UTC, ISO 8601."""
    command: tuple[str, ...]
    """What to run to build it again."""
    built_with: dict[str, str]
    """Versions, compiler, driver and GPU of the machine that built it."""
    build_seconds: dict[str, float]
    pipeline: PipelineConfig
    components: dict[str, Component]
    files: dict[str, FileEntry]
    """Every file of the artifact but the manifest."""
    digest: str
    """sha256 of this manifest's canonical JSON with this field empty."""


def check_relative(name: str, where: str = "The manifest") -> None:
    """Refuses a file name that is absolute, empty, not normalised, or leaves the folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name or "\0" in name:
        raise SdxlError(
            f"{where} names the file {name!r}, which is not a path inside the artifact's folder.",
            "Don't run it before you know who made it.",
        )


def seal(manifest: Manifest) -> Manifest:
    """The same manifest with its own digest filled in."""
    blank = msgspec.structs.replace(manifest, digest="")
    return msgspec.structs.replace(blank, digest=hashlib.sha256(canonical_json(blank)).hexdigest())


def encode(manifest: Manifest) -> bytes:
    """The manifest file's bytes: indented JSON in a fixed order, one final newline."""
    return msgspec.json.format(canonical_json(seal(manifest)), indent=1) + b"\n"


def decode(data: bytes, where: str) -> Manifest:
    """Reads a manifest's bytes and validates them; ``where`` names the file in errors.

    Raises:
        SdxlError: not JSON, a wrong type or field, an unknown schema, a path that leaves the
            folder, or a file that is not byte for byte what was sealed.
    """
    try:
        version = msgspec.json.decode(data, type=_Schema).schema_version
        if version != SCHEMA_VERSION:
            raise SdxlError(
                f"{where} has schema version {version}; this installation reads version {SCHEMA_VERSION}.",
                "Build the artifact again with this version of sdxl-build.",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise SdxlError(f"{where} is not a valid manifest: {error}.", "Build the artifact again.") from None
    names = [*manifest.files]
    for component in manifest.components.values():
        names += [file for variant in component.variants.values() for file in variant.files]
        names += [component.weights] if component.weights else []
    for name in names:
        check_relative(name, where)
        if name not in manifest.files:
            raise SdxlError(f"{where} uses the file {name!r} but does not list it.", "Build the artifact again.")
    if encode(manifest) != data:
        raise SdxlError(f"{where} was changed after it was built.", "Build the artifact again.")
    return manifest


class _Schema(msgspec.Struct):
    schema_version: int


def read(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact's folder.

    Raises:
        SdxlError: no such folder, no manifest in it, or not a valid one.
    """
    root = Path(folder)
    path = root / MANIFEST
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        what = "has no manifest.json, so it is no artifact" if root.is_dir() else "does not exist"
        what = "is a file; an artifact is a folder" if root.is_file() else what
        raise SdxlError(f"{root} {what}.", "List what is there with: sdxl-build ls") from None
    except OSError as error:
        raise SdxlError(f"{path} cannot be read: {error.strerror}.") from None
    return decode(data, str(path))


def as_dict(value: object) -> Any:
    """Plain dicts, lists and scalars, for --json."""
    return msgspec.to_builtins(value)
