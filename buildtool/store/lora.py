"""LoRA files: which checkpoint tensors their low-rank products go to. Reads headers; no torch.

``W + scale * alpha / rank * up @ down`` is what a LoRA makes of a weight (Hu et al., arXiv 2106.09685).
"""

import json
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError
from buildtool.store.files import safetensors_header

Sizes = Mapping[str, Mapping[str, tuple[int, int]]]
"""Component -> matrix or convolution of a checkpoint -> (rows, columns), all but the first dimension flattened."""

COMPONENTS = {
    "unet": ("lora_unet_", "unet."),
    "text_encoder": ("lora_te1_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}
"""Component -> what its keys begin with: kohya's, diffusers'."""

# kohya; PEFT; diffusers before it had PEFT, for modules, text encoders and attention processors.
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight")
_DOWN_PROCESSOR, _UP_PROCESSOR, _ALPHA = "_lora.down.weight", "_lora.up.weight", ".alpha"
_SCALARS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i"}


@dataclass(frozen=True)
class Lora:
    """A file and how much of it."""

    path: Path
    scale: float = 1.0

    def __str__(self) -> str:
        return str(self.path) if self.scale == 1 else f"{self.path}:{self.scale:g}"


@dataclass(frozen=True)
class Product:
    """What is added to one tensor: ``factor * up @ down``, of two tensors of the file by name.

    ``up`` is (rows, rank) and ``down`` (rank, columns), all but their first dimension flattened.
    """

    up: str
    down: str
    factor: float
    """alpha / rank."""


def parse(text: str) -> Lora:
    """``FILE`` or ``FILE:SCALE``; a scale is any finite number, 1 if left out.

    Raises:
        SdxlError: there is no such file.
    """
    path, colon, scale = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            found = Lora(Path(path), float(scale))
        except ValueError:
            found = Lora(Path(text))
    else:
        found = Lora(Path(text))
    if not math.isfinite(found.scale):
        raise SdxlError(
            f"The scale of the LoRA {text} is not a finite number.", "Give FILE:SCALE, such as a.safetensors:0.8"
        )
    if not found.path.is_file():
        raise SdxlError(f"The LoRA {found.path} does not exist.", "Give a .safetensors file: --lora FILE[:SCALE]")
    return found


def touched(path: Path) -> set[str]:
    """The components that a file changes, by what its keys begin with.

    Raises:
        SdxlError: it is no safetensors file, or a key belongs to no component.
    """
    names = _Header(path).shapes
    found = {name: component for name in names if (component := _component(name))}
    _refuse(path, [name for name in names if name not in found], "is for no component of SDXL")
    return set(found.values())


def products(
    path: Path, sizes: Sizes, layers_per_block: Any = 2, unread: Mapping[str, Collection[str]] | None = None
) -> dict[str, dict[str, Product]]:
    """What a file adds to which tensors: component -> tensor -> product.

    Args:
        path: a safetensors file with the names of kohya's scripts (``lora_unet_…``, in diffusers' or in the original
            code's spelling), of PEFT as diffusers saves it, or of diffusers before it had PEFT.
        sizes: the checkpoint's matrices and convolutions.
        layers_per_block: of the UNet's config; the original code numbers its blocks by it.
        unread: tensors by component that the checkpoint has and nothing reads: products for them are left out.

    Raises:
        SdxlError: it is no safetensors file, or holds something that is not such a product for one of ``names``.
    """
    header = _Header(path)
    ignored = {(component, name) for component, names in (unread or {}).items() for name in names}
    known = ignored | {(component, name) for component, names in sizes.items() for name in names}
    spelled = _spellings(known, layers_per_block)
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in header.shapes:
        base, kind = _split(key)
        if kind and base in spelled:
            parts.setdefault(base, {})[kind] = key
        else:
            unknown.append(key)
    _refuse(path, unknown, "is not understood: no low-rank product for a tensor of this model")
    found: dict[str, dict[str, Product]] = {}
    for base, part in parts.items():
        component, name = spelled[base]
        if not {"up", "down"} <= part.keys():
            _refuse(path, [*part.values()], "lacks its other half (up and down come in pairs)")
        if name in found.get(component, {}):
            _refuse(path, [part["up"]], f"is there twice, in two spellings of {name}")
        if (component, name) not in ignored:
            found.setdefault(component, {})[name] = _product(path, header, part, spelled[base], base, sizes)
    return found


def _product(
    path: Path, header: "_Header", part: Mapping[str, str], target: tuple[str, str], base: str, sizes: Sizes
) -> Product:
    up, down = header.shapes[part["up"]], header.shapes[part["down"]]
    rank = down[0] if down else 0
    if len(up) not in (2, 4) or len(down) not in (2, 4) or up[1] != rank or rank == 0 or set(up[2:]) - {1}:
        raise SdxlError(f"{path}: {part['up']} {up} and {part['down']} {down} make no product.", "Leave this LoRA out.")
    component, name = target
    made, wanted = (up[0], math.prod(down[1:])), sizes[component][name]
    if made != wanted:
        raise SdxlError(
            f"{path}: {part['up']} and {part['down']} make {made}; {name} is {wanted}.", "It is for another model."
        )
    alpha = header.scalar(part["alpha"]) if "alpha" in part else header.adapter_alpha(component, base, rank)
    return Product(part["up"], part["down"], alpha / rank)


def _component(key: str) -> str | None:
    for component, starts in COMPONENTS.items():
        if key.startswith(starts):
            return component
    return None


def _split(key: str) -> tuple[str, str]:
    """A key's module, and which part of its product the key is: ``up``, ``down`` or ``alpha``; empty for others."""
    for kind, endings in (("down", _DOWN), ("up", _UP), ("alpha", (_ALPHA,))):
        for ending in endings:
            if key.endswith(ending):
                return key.removesuffix(ending), kind
    for kind, ending in (("down", _DOWN_PROCESSOR), ("up", _UP_PROCESSOR)):
        if key.endswith(ending) and ".processor." in key:
            base = key.removesuffix(ending).replace(".processor.", ".")
            return base + ".0" if base.endswith(".to_out") else base, kind
    return key, ""


def _spellings(known: Collection[tuple[str, str]], layers_per_block: Any) -> dict[str, tuple[str, str]]:
    """Every way to spell a tensor's module in a key -> component and tensor."""
    modules = {name for component, name in known if component == "unet"}
    found = {}
    for component, name in known:
        module = name.removesuffix(".weight")
        if module == name:
            continue
        kohya, diffusers = COMPONENTS[component]
        spelled = [kohya + module.replace(".", "_"), diffusers + module]
        if component == "unet" and isinstance(layers_per_block, int):
            spelled.append(kohya + original(module, layers_per_block, modules).replace(".", "_"))
        elif component != "unet":  # transformers 5.6 dropped this of the first encoder
            spelled.append(diffusers + module.removeprefix("text_model."))
        found.update({each: (component, name) for each in spelled})
    return found


_PLAIN = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def original(module: str, layers: int, names: Collection[str]) -> str:
    """A UNet module's name in the original code, whose blocks are numbered through.

    (diffusers/loaders/lora_conversion_utils.py, ``_maybe_map_sgm_blocks_to_diffusers``, read backwards.)
    """
    if module in _PLAIN:
        return _PLAIN[module]
    block, _, rest = module.partition(".")
    if block == "mid_block":
        kind, number, inner = [*rest.split(".", 2), ""][:3]
        return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{_inner(kind, inner)}"
    if block not in ("down_blocks", "up_blocks"):
        return module
    at, kind, number, inner = [*rest.split(".", 3), ""][:4]
    if kind == "downsamplers":
        return f"input_blocks.{(int(at) + 1) * (layers + 1)}.0.op"
    if block == "down_blocks":
        place = f"input_blocks.{1 + int(at) * (layers + 1) + int(number)}"
        return f"{place}.{0 if kind == 'resnets' else 1}.{_inner(kind, inner)}"
    if kind == "upsamplers":
        attends = any(name.startswith(f"up_blocks.{at}.attentions.") for name in names)
        return f"output_blocks.{int(at) * (layers + 1) + layers}.{2 if attends else 1}.{inner}"
    place = f"output_blocks.{int(at) * (layers + 1) + int(number)}"
    return f"{place}.{0 if kind == 'resnets' else 1}.{_inner(kind, inner)}"


def _inner(kind: str, inner: str) -> str:
    return _RESNET.get(inner, inner) if kind == "resnets" else inner


def _refuse(path: Path, keys: list[str], why: str) -> None:
    if keys:
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise SdxlError(
            f"{path}: {keys[0]}{more} {why}.", "LoRA files of kohya's scripts or of diffusers for SDXL can be read."
        )


class _Header:
    """Shapes, metadata and scalars of a safetensors file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._entries, self._data, _ = safetensors_header(path)
            metadata = self._entries.pop("__metadata__", None) or {}
            self.shapes = {name: tuple(entry["shape"]) for name, entry in self._entries.items()}
            self._adapter: dict[str, Any] = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except OSError as error:
            raise SdxlError(f"The LoRA {path} cannot be read: {error.strerror}.") from None
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise SdxlError(f"The LoRA {path} is no safetensors file.", "Download it again.") from None

    def scalar(self, name: str) -> float:
        """The value of a tensor of one element."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        with self._path.open("rb") as file:
            file.seek(self._data + begin)
            raw = file.read(end - begin)
        try:
            if entry["dtype"] == "BF16":  # the upper half of a float
                return float(struct.unpack("<f", b"\0\0" + raw)[0])
            return float(struct.unpack(_SCALARS[entry["dtype"]], raw)[0])
        except (struct.error, KeyError):
            raise SdxlError(f"{self._path}: {name} is no number.", "Download it again.") from None

    def adapter_alpha(self, component: str, base: str, rank: int) -> float:
        """A product's alpha from the metadata that diffusers saves beside PEFT's names; without, its rank."""
        settings = {
            name.removeprefix(f"{component}."): value
            for name, value in self._adapter.items()
            if name.startswith(f"{component}.")
        }
        for name in ("use_rslora", "use_dora", "alpha_pattern"):
            if settings.get(name):
                raise SdxlError(
                    f"{self._path} uses PEFT's {name}, which can't be read.", "Save it with plain LoRA layers."
                )
        return float(settings.get("lora_alpha", rank))
