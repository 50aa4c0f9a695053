"""The same components without the project: diffusers' and transformers' modules, eager and through torch.compile.

They get the artifact's own weights, so that their outputs can be held against its golden tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from buildtool.store.manifest import Component, Manifest
from exporters import sdxl

NAMES = ("eager", "eager-nchw", "compile", "max-autotune")
COMPILE: dict[str, dict[str, Any]] = {"compile": {}, "max-autotune": {"mode": "max-autotune"}}

Call = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


def title(name: str, component: str) -> str:
    """A peer as a table has it."""
    library, layout = ("transformers", "") if component.startswith("text_encoder") else ("diffusers", ", channels-last")
    if name in COMPILE:
        return f"torch.compile{' max-autotune' if name == 'max-autotune' else ''}{layout}"
    return f"{library} eager{', NCHW' if name == 'eager-nchw' else layout}"


class Peers:
    """The peers of one component of an artifact; they share weights but for ``eager-nchw``.

    Args:
        folder, manifest: the artifact.
        component: ``unet``, ``vae_decoder``, ``text_encoder`` or ``text_encoder_2``.
        device: where they run.
    """

    def __init__(self, folder: Path, manifest: Manifest, component: str, device: torch.device) -> None:
        described = manifest.components[component]
        # What goes in may be token ids; what comes out is in the component's own precision.
        self._dtype: torch.dtype = getattr(torch, next(iter(described.variants.values())).outputs[0].dtype)
        self._modules: dict[torch.memory_format, nn.Module] = {}
        self._calls: dict[str, Call] = {}
        self._make: Callable[[], tuple[nn.Module, bool]] = lambda: build(
            folder, manifest, component, self._dtype, device
        )
        self.exact = False
        """Whether they have the artifact's weights, so that golden tensors say something of them."""

    def call(self, name: str) -> Call:
        """The peer of that name, from inputs by name to outputs in the manifest's order; it compiles when called."""
        if name not in self._calls:
            self._calls[name] = self._call(name)
        return self._calls[name]

    def _call(self, name: str) -> Call:
        module = self._module(torch.contiguous_format if name == "eager-nchw" else torch.channels_last)
        if name not in COMPILE:
            return lambda inputs: module(**inputs)
        # cfg and nocfg differ in batch: left to itself, the second would be compiled for any batch, which is slower.
        options: dict[str, Any] = COMPILE[name]
        compiled: Any = torch.compile(_sharing(module), dynamic=False, **options)

        def call(inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
            # max-autotune's outputs of the last call may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return compiled(**inputs)

        return call

    def _module(self, layout: torch.memory_format) -> nn.Module:
        if layout not in self._modules:
            module, self.exact = self._make()
            nn.Module.to(module, memory_format=layout)  # type: ignore[call-overload]
            self._modules[layout] = module
        return self._modules[layout]


def _sharing(module: nn.Module) -> nn.Module:
    """A module of its own with the same tensors: two ways of compiling don't meet in it."""
    kept = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied: nn.Module = copy.deepcopy(module, kept)
    return copied


def build(
    folder: Path, manifest: Manifest, component: str, dtype: torch.dtype, device: torch.device
) -> tuple[nn.Module, bool]:
    """A component as the libraries define it, with the inputs and outputs of the artifact's variants.

    Returns:
        The module on ``device`` in ``dtype``, and whether its weights are the artifact's: random ones take
        their place where the engines hold their own, or in another number format.
    """
    row = sdxl.component(component)
    config = manifest.key.configs[row.source]
    module = _empty(component, config)
    described = manifest.components[component]
    usable = bool(described.weights) and all(
        getattr(torch, stored.dtype).itemsize > 1 for stored in described.tensors.values()
    )
    found = stored_sources(folder, described, _shapes(component, module), device) if usable else {}
    filled = {}
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in module.state_dict().items():
        tensor = found.get(name)
        if tensor is None:  # the last layer of a text encoder, of which nothing is read; or there are no weights at all
            tensor = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32) * 0.02
        filled[name] = tensor.to(dtype)
    module.load_state_dict(filled, strict=True, assign=True)
    _fill_position_ids(module, device)
    return module.eval().requires_grad_(False), bool(found)


def _empty(component: str, config: Mapping[str, Any]) -> nn.Module:
    """The module on the meta device."""
    if component.startswith("text_encoder"):
        import transformers

        projected = component == "text_encoder_2"
        cls: Any = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        settings = {k: v for k, v in config.items() if k not in ("_class_name", "model_type")}
        with torch.device("meta"):
            return sdxl.ReferenceTextEncoder(cls(transformers.CLIPTextConfig(**settings)), projected)
    import diffusers

    cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        model = cls.from_config({k: v for k, v in config.items() if k != "_class_name"})
    if component == "unet":
        return sdxl.UNetGraph(model)
    for half in ("encoder", "quant_conv"):
        if hasattr(model, half):
            setattr(model, half, None)
    return sdxl.VaeDecoderGraph(model)


def _shapes(component: str, module: nn.Module) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The checkpoint's name of each tensor -> the module's name of it, and its shape."""
    named: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, tensor in module.state_dict().items():
        own = name.removeprefix("model.")
        # transformers 5.6 dropped a prefix that files kept; whichever of the two is there, is meant.
        for spelt in {own, own.removeprefix("text_model."), f"text_model.{own}"}:
            named[spelt] = (name, tuple(tensor.shape))
    return named


def stored_sources(
    folder: Path,
    described: Component,
    wanted: Mapping[str, tuple[str, tuple[int, ...]]],
    device: torch.device,
) -> dict[str, Tensor]:
    """The checkpoint's tensors, cut out of the artifact's weights file.

    Args:
        folder: the artifact's.
        described: the component in its manifest.
        wanted: a source's name -> the name to return it under, and its shape.
        device: where they go.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    with safe_open(folder / described.weights, framework="pt") as file:
        for name, stored in described.tensors.items():
            if not all(source in wanted for source in stored.sources):
                continue
            joined = file.get_tensor(name).flatten().to(device).as_strided(stored.shape, stored.stride)
            start = 0
            for source in stored.sources:
                own, shape = wanted[source]
                flat = len(stored.shape) == 1
                count = torch.Size(shape).numel() if flat else shape[0]
                found[own] = joined[start : start + count].reshape(shape).clone()
                start += count
    return found


def _fill_position_ids(module: nn.Module, device: torch.device) -> None:
    """transformers' one buffer that no checkpoint stores: 0, 1, 2, …"""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            assert leaf == "position_ids", name
            module.get_submodule(parent)._buffers[leaf] = torch.arange(buffer.shape[-1], device=device)[None]
