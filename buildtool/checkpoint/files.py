"""Safetensors files: their headers, read without a library, and the weights files of a component's folder."""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError

Shapes = dict[str, tuple[int, ...]]
"""Tensor name -> shape."""

_MAX_HEADER = 100_000_000
_DTYPE_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        shapes: tensor -> shape.
        dtypes: tensor -> the file's name of its dtype, such as ``F16``.
        metadata: the file's ``__metadata__``.
    """

    shapes: Shapes
    dtypes: dict[str, str]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file, and nothing of its tensors.

    Raises:
        SdxlError: not there, not a safetensors file (and what it is instead), or cut short.
    """
    refuse_pickle(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            if not start:
                raise SdxlError(f"{path} is empty.", "Download it again.")
            if start.startswith(b"version https://git-lfs"):
                raise SdxlError(f"{path} is a Git LFS pointer, not the weights.", f"Run: git -C {path.parent} lfs pull")
            if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
                raise SdxlError(f"{path} is a pickle under another name; loading one can run code.", _CONVERT)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if not 2 <= length <= _MAX_HEADER or start[8:9] not in (b"{", b""):
                raise SdxlError(f"{path} is not a safetensors file.", "Give a .safetensors file or a diffusers folder.")
            if 8 + length > size:
                raise _cut_short(path, size, f"its header alone has {8 + length:,}")
            file.seek(8)
            raw = json.loads(file.read(length))
    except FileNotFoundError:
        raise SdxlError(f"{path} does not exist.") from None
    except OSError as error:
        raise SdxlError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise SdxlError(f"{path} has a damaged safetensors header.", "Download it again.") from None
    return _parse(path, raw, size - 8 - length)


def _parse(path: Path, raw: Any, data_bytes: int) -> Header:
    try:
        metadata = dict(raw.pop("__metadata__", {}) or {})
        shapes, dtypes, end = {}, {}, 0
        for name, entry in raw.items():
            shape = tuple(int(n) for n in entry["shape"])
            first, last = entry["data_offsets"]
            count = 1
            for n in shape:
                count *= n
            bits = _DTYPE_BITS.get(entry["dtype"])
            if min(shape, default=0) < 0 or not 0 <= first <= last or (bits and (last - first) * 8 != count * bits):
                raise ValueError(name)
            shapes[name], dtypes[name], end = shape, entry["dtype"], max(end, last)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise SdxlError(f"{path} has a damaged safetensors header.", "Download it again.") from None
    if end > data_bytes:
        raise _cut_short(path, data_bytes, f"its header promises {end:,} of tensors")
    return Header(shapes, dtypes, metadata)


def _cut_short(path: Path, size: int, promised: str) -> SdxlError:
    return SdxlError(f"{path} is cut short: {size:,} bytes are there, {promised}.", "Download it again.")


_CONVERT = (
    "Have someone who trusts it convert it once: in Python, "
    "StableDiffusionXLPipeline.from_pretrained(DIR).save_pretrained(NEW_DIR), which writes safetensors."
)


def refuse_pickle(path: Path) -> None:
    """Refuses files that are read with pickle, by their name."""
    if path.suffix.lower() in _PICKLES:
        raise SdxlError(f"{path} is a pickle; loading one can run code, so only .safetensors is read.", _CONVERT)


@dataclass(frozen=True)
class WeightFiles:
    """The safetensors files of one component.

    Attributes:
        files: in the order of their names.
        variant: the variant that was found; "" where the plain files are used.
    """

    files: tuple[Path, ...]
    variant: str

    def headers(self) -> dict[Path, Header]:
        """Each file's header."""
        return {path: read_header(path) for path in self.files}


_STEMS = ("diffusion_pytorch_model", "model")


def find_weights(folder: Path, variant: str) -> WeightFiles | None:
    """The weights in a component's folder; the variant's if there, else the plain ones, else None.

    Raises:
        SdxlError: the weights are there as pickles only, or an index names a shard that is missing.
    """
    for kind in (variant, "") if variant else ("",):
        for stem in _STEMS:
            single = folder / (f"{stem}.{kind}.safetensors" if kind else f"{stem}.safetensors")
            if single.exists() or single.is_symlink():
                return WeightFiles((single,), kind)
            index = folder / f"{stem}.safetensors.index{'.' + kind if kind else ''}.json"
            if index.exists():
                return WeightFiles(_shards(index), kind)
    pickles = sorted(p.name for p in _listing(folder) if p.suffix in _PICKLES and p.name.startswith(_STEMS))
    if pickles and not variants(folder):
        raise SdxlError(f"{folder} has its weights only as {pickles[0]}, a pickle that can run code.", _CONVERT)
    return None


def variants(folder: Path) -> list[str]:
    """The variants of which a component's folder has safetensors files, such as ``["fp16"]``."""
    found = set()
    for path in _listing(folder):
        parts = path.name.split(".")
        if len(parts) == 3 and parts[0] in _STEMS and parts[2] == "safetensors":
            found.add(parts[1].split("-")[0])
        elif len(parts) == 5 and parts[0] in _STEMS and parts[1:3] == ["safetensors", "index"]:
            found.add(parts[3])
    return sorted(found)


def _listing(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else ()


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SdxlError(f"{index} is damaged.", "Download it again.") from None
    for name in names:
        if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
            raise SdxlError(f"{index} names a shard outside its folder: {name!r}.")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing or not names:
        raise SdxlError(f"{index.parent} lacks {', '.join(missing) or 'all shards'}, which its index names.")
    return tuple(index.parent / name for name in names)
