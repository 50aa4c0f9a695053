"""A component's tensors, read when they are asked for. The one place of the checkpoint code that needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildtool.checkpoint.configs import Config
from buildtool.checkpoint.files import Shapes, read_header
from buildtool.store.errors import SdxlError

if TYPE_CHECKING:
    import torch

Getter = Callable[[], "torch.Tensor"]


class LazyTensors(Mapping[str, "torch.Tensor"]):
    """Tensors by name, each read or made anew when it is asked for, on the CPU; none is kept."""

    def __init__(self, getters: Mapping[str, Getter]) -> None:
        self._getters = dict(getters)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._getters[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._getters)

    def __len__(self) -> int:
        return len(self._getters)


def file_getters(files: tuple[Path, ...]) -> dict[str, Getter]:
    """A getter for every tensor of some safetensors files, by the names in them."""
    from safetensors import safe_open

    getters: dict[str, Getter] = {}
    for path in files:
        opened: Any = safe_open(path, framework="pt", device="cpu")

        def get(name: str, opened: Any = opened) -> torch.Tensor:
            tensor: torch.Tensor = opened.get_tensor(name)
            return tensor

        getters.update({name: _bind(get, name) for name in read_header(path).shapes})
    return getters


def _bind(get: Callable[[str], torch.Tensor], name: str) -> Getter:
    return lambda: get(name)


def module_shapes(component: str, config: Config) -> Shapes:
    """Names and shapes of a component's state dict, as checkpoint files spell them; no memory is taken."""
    import torch

    values = {key: value for key, value in config.items() if key != "_class_name"}
    name = config["_class_name"]
    module: torch.nn.Module
    with torch.device("meta"):
        if name.startswith("CLIP"):
            import transformers

            module = getattr(transformers, name)(transformers.CLIPTextConfig(**values))
        else:
            import diffusers

            module = getattr(diffusers, name).from_config(dict(config))
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if name == "CLIPTextModel":
        # transformers 5 dropped the prefix that every file has; plans of weights files name the files' tensors.
        shapes = {f"text_model.{key.removeprefix('text_model.')}": shape for key, shape in shapes.items()}
    return shapes


# Left in some files by training code or by other versions of the libraries; no module reads them.
_IGNORED = ("position_ids", "logit_scale")


def fit(where: str, component: str, config: Config, getters: Mapping[str, Getter], shapes: Shapes) -> LazyTensors:
    """The tensors under the names that `module_shapes` gives, in its order.

    Args:
        where: file or folder, for messages.
        component: its name.
        config: its clean config.
        getters: tensors by the file's names.
        shapes: their shapes.

    Raises:
        SdxlError: a tensor is missing, of another shape, or not part of the component.
    """
    wanted = module_shapes(component, config)
    found: dict[str, Getter] = {}
    extra: list[str] = []
    for stored, getter in getters.items():
        name = _name(stored, wanted)
        if name is None:
            extra.append(stored)
            continue
        shape = shapes[stored]
        if shape != wanted[name] and len(shape) == 4 and shape[2:] == (1, 1) and shape[:2] == wanted[name]:
            getter = _flattened(getter)  # attention that older VAEs store as 1x1 convolutions
        elif shape != wanted[name]:
            raise SdxlError(f"{where} has {stored} of shape {shape}; its config makes it {wanted[name]}.")
        found[name] = getter
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SdxlError(
            f"{where} lacks {missing[0]}{more} of the {component}.", "Download it again, or check its config."
        )
    extra = [name for name in extra if not _ignored(component, name)]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise SdxlError(
            f"{where} holds {extra[0]}{more}, which is no part of the {component} that its config describes."
        )
    return LazyTensors({name: found[name] for name in wanted})


def _ignored(component: str, name: str) -> bool:
    if component.startswith("text_encoder") and name.startswith(("text_projection.", "vision_model.")):
        return True
    return name.endswith(_IGNORED)


_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _name(stored: str, wanted: Shapes) -> str | None:
    """The state dict's name of a stored tensor; names moved between versions of the libraries."""
    if stored in wanted:
        return stored
    if (name := f"text_model.{stored}") in wanted:  # saved by a transformers that had dropped the prefix
        return name
    for old, new in _OLD_ATTENTION.items():
        if old in stored and (name := stored.replace(old, new)) in wanted:
            return name
    return None


def _flattened(getter: Getter) -> Getter:
    return lambda: getter()[:, :, 0, 0]
