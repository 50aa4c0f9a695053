"""SDXL's components: what goes in and out of each, how it is loaded, and how exact it has to be.

Every exporter reads this table; none has its own idea of a component.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporters import clip, deepcache, fp8, freeu, fusion, segments, vae_attention
from exporters.base import ExportError, Request, TensorSpec

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TENSORS = {**DTYPES, "fp8": torch.float16}
"""What goes in and out: fp8 is for the inside of a component."""
PROMPT_TOKENS = 77
AESTHETIC_SCORE = 6

Configs = Mapping[str, Mapping[str, Any]]
Tensors = Mapping[str, Tensor]


class UNetGraph(nn.Module):
    """The UNet with plain tensors in and out, as every backend compiles it.

    Where ``encoder_hidden_states`` has fewer rows than ``sample``, the first rows' text is zeros.
    With a ``branch``, it gives the feature of :mod:`exporters.deepcache` too, or takes it and runs the layers above.
    """

    def __init__(self, unet: nn.Module, branch: int | None = None) -> None:
        super().__init__()
        self.model = unet
        self.branch = branch

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor,
        time_ids: Tensor,
        feature: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        conditions = {"text_embeds": text_embeds, "time_ids": time_ids}
        encoder_hidden_states = self._text(encoder_hidden_states, sample.shape[0])
        if self.branch is not None:
            made = deepcache.run(self.model, self.branch, sample, timestep, encoder_hidden_states, conditions, feature)
            return tuple(tensor.contiguous() for tensor in made)
        noise: Tensor = self.model(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=conditions, return_dict=False
        )[0]
        return (noise.contiguous(),)

    def _text(self, encoder_hidden_states: Tensor, batch: int) -> Tensor:
        """The text as the model takes it: with rows of zeros before those that are given."""
        without = batch - encoder_hidden_states.shape[0]
        return F.pad(encoder_hidden_states, (0, 0, 0, 0, without, 0)) if without else encoder_hidden_states


class JoinedUNetGraph(UNetGraph):
    """The same for a UNet whose :mod:`products are joined <exporters.fusion>`."""

    def _text(self, encoder_hidden_states: Tensor, batch: int) -> Tensor:
        """Every block's keys and values."""
        made: Tensor = self.model.to_kv(encoder_hidden_states)  # type: ignore[operator]
        return made


class VaeDecoderGraph(nn.Module):
    """The VAE's decoder, from latents that are already divided by the scaling factor."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.model = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        image: Tensor = self.model.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return (image.contiguous(),)


class VaeEncoderGraph(nn.Module):
    """The VAE's encoder, to the mean and log variance of latents that aren't scaled yet; a tiny VAE's to latents."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.model = vae

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        moments: Tensor = self.model.encoder(image)  # type: ignore[operator]
        if getattr(self.model, "quant_conv", None) is not None:
            moments = self.model.quant_conv(moments)  # type: ignore[operator]
        return (moments.contiguous(),)


class ReferenceTextEncoder(nn.Module):
    """transformers' own text encoder: what the golden tensors are computed with."""

    def __init__(self, model: nn.Module, projected: bool) -> None:
        super().__init__()
        self.model = model
        self.projected = projected

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        out = self.model(input_ids, output_hidden_states=True)
        hidden = out.hidden_states[-2]
        return (hidden, out.text_embeds) if self.projected else (hidden,)


@dataclass(frozen=True)
class Graph:
    """A module to compile, and the checkpoint's tensors behind each of its parameters.

    ``recipes`` has the parameters that are computed of those; ``outputs`` are named where they aren't the component's.
    """

    module: nn.Module
    sources: dict[str, tuple[str, ...]]
    recipes: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Component:
    """One row of the table.

    Args:
        name: the component's name in artifacts.
        source: whose weights and config it is made of.
        variants: its compiled forms.
        sized, batched: whether its code depends on the resolution and the batch.
        tolerance: precision -> allowed ||out - golden|| / ||golden|| of each output.
        inputs: (configs, request, variant, dtype) -> specs.
        outputs: the outputs' names.
        reference: (config, tensors, device) -> fp32 eager, from the libraries that define the model.
        graph: (config, device, dtype) -> what is compiled, with weights of no meaning.
        whole: of a component in segments, whose variants are ``cfg.1``, ``cfg.2``, …: the same in one piece.
    """

    name: str
    source: str
    variants: tuple[str, ...]
    sized: bool
    batched: bool
    tolerance: Mapping[str, float]
    inputs: Callable[[Configs, Request, str, torch.dtype], tuple[TensorSpec, ...]]
    outputs: tuple[str, ...]
    reference: Callable[[Mapping[str, Any], Tensors, str], nn.Module]
    graph: Callable[[Mapping[str, Any], str, torch.dtype], Graph]
    whole: "Component | None" = None

    def graph_of(self, variant: str, config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Graph:
        """What is compiled of one variant."""
        if self.whole is None:
            return self.graph(config, device, dtype)
        return self.graph(config, device, dtype, segment=_segment(variant))  # type: ignore[call-arg]

    def precision(self, configs: Configs, request: Request) -> str:
        """What the component computes in: the VAE in fp32 where diffusers upcasts it."""
        if request.precision == "fp8" and self.source == "unet":
            return "fp8"
        half = "fp16" if request.precision == "fp8" else request.precision
        upcast = self.source == "vae" and configs["vae"].get("force_upcast", False)
        return "fp32" if upcast and half == "fp16" else half

    def tolerated(self, precision: str) -> float:
        """The allowed error in an artifact of this precision; components that aren't in fp8 are in fp16."""
        return self.tolerance[precision if precision in self.tolerance else "fp16"]

    def outputs_of(self, variant: str) -> tuple[str, ...]:
        """The outputs' names of one variant: a shallow one has only the first."""
        return self.outputs[:1] if variant.endswith(deepcache.SHALLOW) else self.outputs


def spec(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> TensorSpec:
    """A contiguous tensor's spec."""
    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorSpec(name, shape, str(dtype).removeprefix("torch."), strides)


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tuple(tensor.stride()))


def vae_scale_factor(vae: Mapping[str, Any]) -> int:
    """Pixels per latent, in each direction (diffusers' ``pipe.vae_scale_factor``)."""
    channels = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
    return int(2 ** (len(channels) - 1))


def _latent_shape(configs: Configs, request: Request, batch: int) -> tuple[int, int, int, int]:
    factor = vae_scale_factor(configs["vae"])
    return (batch, configs["unet"]["in_channels"], request.height // factor, request.width // factor)


def _text_inputs(configs: Configs, request: Request, variant: str, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    return (spec("input_ids", (1, PROMPT_TOKENS), torch.int64),)


def _unet_inputs(configs: Configs, request: Request, variant: str, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    unet = configs["unet"]
    guided = variant.removesuffix(deepcache.SHALLOW) == "cfg"
    batch = request.batch * (2 if guided else 1)
    texts = request.batch if request.options.get("no_negative_prompt") else batch
    ids = 6 if "text_encoder" in configs else 5  # a refiner's: original size, crop and aesthetic score
    pooled = unet["projection_class_embeddings_input_dim"] - ids * unet["addition_time_embed_dim"]
    latents = _latent_shape(configs, request, batch)
    feature: tuple[TensorSpec, ...] = ()
    if variant.endswith(deepcache.SHALLOW):
        shape = deepcache.feature_shape(unet, request.options["deepcache"]["branch"], latents)
        feature = (spec("feature", shape, dtype),)
    return (
        spec("sample", latents, dtype),
        spec("timestep", (1,), torch.float32),
        spec("encoder_hidden_states", (texts, PROMPT_TOKENS, unet["cross_attention_dim"]), dtype),
        spec("text_embeds", (batch, pooled), dtype),
        spec("time_ids", (batch, ids), dtype),
        *feature,
    )


def _decoder_inputs(configs: Configs, request: Request, variant: str, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    if "vae_tile" in request.options:
        width, height = request.options["vae_tile"]
        request = replace(request, width=width, height=height)
    return (spec("latents", _latent_shape(configs, request, request.batch), dtype),)


def _encoder_inputs(configs: Configs, request: Request, variant: str, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    return (spec("image", (request.batch, 3, request.height, request.width), dtype),)


def load_weights(module: nn.Module, tensors: Tensors, names: Callable[[str], str], device: str) -> None:
    """Gives a module on the meta device a checkpoint's weights, in fp32, in place.

    Raises:
        ExportError: the checkpoint lacks a tensor or has one of another shape.
    """
    filled: dict[str, Tensor] = {}
    for name, parameter in module.state_dict().items():
        source = names(name)
        if source not in tensors:
            raise ExportError(f"The checkpoint has no tensor {source!r}, which its config asks for.")
        tensor = tensors[source]
        if tensor.shape != parameter.shape:
            raise ExportError(
                f"The checkpoint's {source} has shape {tuple(tensor.shape)}; its config says {tuple(parameter.shape)}."
            )
        filled[name] = tensor.to(device=device, dtype=torch.float32)
    module.load_state_dict(filled, strict=True, assign=True)
    module.eval().requires_grad_(False)


def fill_with_noise(module: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    """Gives a module on the meta device small random weights, convolutions channels-last, in place.

    Code is compiled with these: whatever of a checkpoint found its way into it would be missed at
    once. They are random and not zero because a compiler may time kernels on them.
    """
    nn.Module.to(module, dtype=dtype)  # not diffusers' own `to`, which warns of modules that it doesn't have
    module.to_empty(device=device)
    nn.Module.to(module, memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module.eval().requires_grad_(False)


def _fill_position_ids(module: nn.Module, device: str) -> None:
    """The one buffer that transformers' CLIP has and no checkpoint stores: 0, 1, 2, …"""
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            parent, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise RuntimeError(f"the reference model has an unknown buffer {name}")
            module.get_submodule(parent)._buffers[leaf] = torch.arange(buffer.shape[-1], device=device)[None]


def _diffusers_model(config: Mapping[str, Any]) -> nn.Module:
    """The model on the meta device."""
    import diffusers

    cls = getattr(diffusers, config["_class_name"])
    with torch.device("meta"):
        model: nn.Module = cls.from_config({k: v for k, v in config.items() if k != "_class_name"})
    return model


def _transformers_model(config: Mapping[str, Any], tensors: Tensors, device: str, projected: bool) -> nn.Module:
    import transformers

    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    settings = transformers.CLIPTextConfig(
        **{k: v for k, v in config.items() if k not in ("_class_name", "model_type")}
    )
    settings._attn_implementation = "eager"
    with torch.device("meta"):
        model = cls(settings)
    # transformers 5 dropped the prefix "text_model." of the model without projection; files kept it.
    load_weights(model, tensors, lambda name: name if name in tensors else f"text_model.{name}", device)
    _fill_position_ids(model, device)
    return model


def _text_reference(projected: bool) -> Callable[[Mapping[str, Any], Tensors, str], nn.Module]:
    return lambda config, tensors, device: ReferenceTextEncoder(
        _transformers_model(config, tensors, device, projected), projected
    ).eval()


def _text_graph(cls: type[nn.Module]) -> Callable[[Mapping[str, Any], str, torch.dtype], Graph]:
    def graph(config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Graph:
        with torch.device("meta"):
            module = cls(dict(config))
        fill_with_noise(module, device, dtype)
        return Graph(module, {name: clip.sources(name) for name in module.state_dict()})

    return graph


def _unet_reference(
    config: Mapping[str, Any], tensors: Tensors, device: str, options: Mapping[str, Any] = {}
) -> nn.Module:
    unet: Any = _diffusers_model(config)
    load_weights(unet, tensors, str, device)
    if "freeu" in options and "deepcache" in options:  # whose steps don't call diffusers' blocks, only what is in them
        freeu.enable(unet, options["freeu"])
    elif "freeu" in options:
        unet.enable_freeu(**options["freeu"])
    return UNetGraph(unet, _branch(options)).eval()


def _unet_graph(config: Mapping[str, Any], device: str, dtype: torch.dtype, options: Mapping[str, Any] = {}) -> Graph:
    unet = fill_with_noise(_diffusers_model(config), device, dtype)
    joined = {**fusion.join_attention(unet), **fusion.join_time_projections(unet)}
    recipes = fp8.quantize(unet, joined) if options.get("fp8") else {}
    known = joined | {name: sources for name, (_, sources) in recipes.items()}
    sources = {f"model.{name}": known.get(name, (name,)) for name in unet.state_dict()}
    if "freeu" in options:
        freeu.enable(unet, options["freeu"])
    made = {f"model.{name}": recipe for name, (recipe, _) in recipes.items()}
    return Graph(JoinedUNetGraph(unet, _branch(options)).eval(), sources, made)


def _parts(config: Mapping[str, Any], count: int) -> list[segments.Part]:
    key = json.dumps([config, count], sort_keys=True)
    if key not in _cuts:
        _cuts[key] = segments.parts(_diffusers_model(config), config, count)
    return _cuts[key]


_cuts: dict[str, list[segments.Part]] = {}


def _segment(variant: str) -> int:
    return int(variant.rpartition(".")[2])


def _segment_inputs(
    configs: Configs, request: Request, variant: str, dtype: torch.dtype, count: int
) -> tuple[TensorSpec, ...]:
    part = _parts(configs["unet"], count)[_segment(variant) - 1]
    whole = _unet_inputs(configs, request, variant.partition(".")[0], dtype)
    return tuple(segments.inputs(part, whole, configs["unet"], dtype))


def _segment_graph(
    config: Mapping[str, Any], device: str, dtype: torch.dtype, options: Mapping[str, Any] = {}, segment: int = 0
) -> Graph:
    part = _parts(config, options["segments"])[segment - 1]
    unet = _diffusers_model(config)
    if "freeu" in options:
        freeu.enable(unet, options["freeu"])
    segments.prune(unet, part)
    module, sources, recipes = segments.graph(fill_with_noise(unet, device, dtype), part, bool(options.get("fp8")))
    return Graph(module, sources, recipes, part.outputs)


def _branch(options: Mapping[str, Any]) -> int | None:
    branch: int | None = options.get("deepcache", {}).get("branch")
    return branch


def _vae_reference(cls: type[nn.Module]) -> Callable[[Mapping[str, Any], Tensors, str], nn.Module]:
    def reference(config: Mapping[str, Any], tensors: Tensors, device: str) -> nn.Module:
        vae = _diffusers_model(config)
        load_weights(vae, tensors, str, device)
        return cls(vae).eval()

    return reference


def _vae_graph(cls: type[nn.Module], unread: tuple[str, ...]) -> Callable[[Mapping[str, Any], str, torch.dtype], Graph]:
    """One half of a VAE; ``unread`` are the modules of the other."""

    def graph(config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Graph:
        vae = _diffusers_model(config)
        for module in unread:
            if hasattr(vae, module):
                setattr(vae, module, None)
        fill_with_noise(vae, device, dtype)
        if device.startswith("cuda"):
            vae_attention.in_parts(vae)
        return Graph(cls(vae).eval(), {f"model.{name}": (name,) for name in vae.state_dict()})

    return graph


COMPONENTS: tuple[Component, ...] = (
    Component(
        name="text_encoder",
        source="text_encoder",
        variants=("main",),
        sized=False,
        batched=False,
        tolerance={"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2},
        inputs=_text_inputs,
        outputs=("hidden_states",),
        reference=_text_reference(projected=False),
        graph=_text_graph(clip.TextEncoder),
    ),
    Component(
        name="text_encoder_2",
        source="text_encoder_2",
        variants=("main",),
        sized=False,
        batched=False,
        tolerance={"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2},
        inputs=_text_inputs,
        outputs=("hidden_states", "text_embeds"),
        reference=_text_reference(projected=True),
        graph=_text_graph(clip.TextEncoderWithProjection),
    ),
    Component(
        name="unet",
        source="unet",
        variants=("cfg", "nocfg"),
        sized=True,
        batched=True,
        tolerance={"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2, "fp8": 1e-1},
        inputs=_unet_inputs,
        outputs=("noise_pred",),
        reference=_unet_reference,
        graph=_unet_graph,
    ),
    Component(
        name="vae_decoder",
        source="vae",
        variants=("main",),
        sized=True,
        batched=True,
        tolerance={"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2},
        inputs=_decoder_inputs,
        outputs=("sample",),
        reference=_vae_reference(VaeDecoderGraph),
        graph=_vae_graph(VaeDecoderGraph, unread=("encoder", "quant_conv")),
    ),
    Component(
        name="vae_encoder",
        source="vae",
        variants=("main",),
        sized=True,
        batched=True,
        tolerance={"fp32": 1e-4, "fp16": 1e-2, "bf16": 4e-2},
        inputs=_encoder_inputs,
        outputs=("moments",),
        reference=_vae_reference(VaeEncoderGraph),
        graph=_vae_graph(VaeEncoderGraph, unread=("decoder", "post_quant_conv")),
    ),
)


def component(name: str, options: Mapping[str, Any] = {}) -> Component:
    """The row of a component, as an artifact's options (``freeu``, ``deepcache``, ``fp8``, ``segments``) change it."""
    row = next(c for c in COMPONENTS if c.name == name)
    if name != "unet" or not options.keys() & {"freeu", "deepcache", "fp8", "segments"}:
        return row
    row = replace(row, reference=partial(_unet_reference, options=options), graph=partial(_unet_graph, options=options))
    if "segments" in options:
        count = options["segments"]
        return replace(
            row,
            whole=row,
            variants=tuple(f"{variant}.{number}" for variant in row.variants for number in range(1, count + 1)),
            inputs=partial(_segment_inputs, count=count),
            graph=partial(_segment_graph, options=options),
        )
    if "deepcache" not in options:
        return row
    shallow = tuple(variant + deepcache.SHALLOW for variant in row.variants)
    return replace(row, variants=row.variants + shallow, outputs=(*row.outputs, "feature"))


def example_inputs(
    component: Component, configs: Configs, request: Request, variant: str, seed: int = 0
) -> dict[str, Tensor]:
    """Seeded inputs of a variant on the request's device: to trace with, and to check with.

    Values look like a run's: unit-normal latents and text, a middle timestep, the resolution's own
    micro-conditioning, prompts that end somewhere.
    """
    dtype = TENSORS[component.precision(configs, request)]
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Tensor] = {}
    for want in component.inputs(configs, request, variant, dtype):
        if want.name == "input_ids":
            inputs[want.name] = _example_ids(configs[component.source], want.shape, generator)
        elif want.name == "timestep":
            inputs[want.name] = torch.full(want.shape, 501.0)
        elif want.name == "time_ids":
            size = [request.height, request.width]
            row = [*size, 0, 0, *(size if want.shape[1] == 6 else [AESTHETIC_SCORE])]
            inputs[want.name] = torch.tensor([row]).expand(want.shape).to(dtype).contiguous()
        else:
            drawn = torch.randn(want.shape, generator=generator).to(dtype)
            inputs[want.name] = torch.empty_strided(want.shape, want.stride, dtype=dtype).copy_(drawn)
    return {name: tensor.to(request.device) for name, tensor in inputs.items()}


def _example_ids(config: Mapping[str, Any], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A start token, words, the end token (CLIP's highest id) and padding."""
    end = config["vocab_size"] - 1
    ids = torch.randint(0, end - 1, shape, generator=generator)
    ids[:, 0] = end - 1
    ids[:, shape[1] // 3 :] = end
    return ids


@torch.no_grad()
def golden(component: Component, configs: Configs, tensors: Tensors, request: Request) -> dict[str, Tensor]:
    """Inputs of every variant and what fp32 eager (TF32 off) makes of them, on the CPU.

    Returns:
        ``<component>.<variant>.input.<name>`` as the engine takes them (its dtypes), and
        ``<component>.<variant>.output.<name>`` in fp32. A component in segments is computed, and checked, as a whole.
    """
    component = component.whole or component
    reference = component.reference(configs[component.source], tensors, request.device)
    made: dict[str, Tensor] = {}
    with _exact_fp32():
        for variant in component.variants:
            prefix = f"{component.name}.{variant}"
            inputs = example_inputs(component, configs, request, variant)
            made.update({f"{prefix}.input.{name}": tensor.cpu() for name, tensor in inputs.items()})
            exact = {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}
            for name, tensor in zip(component.outputs_of(variant), reference(**exact), strict=True):
                made[f"{prefix}.output.{name}"] = tensor.float().cpu().contiguous()
    return made


class _exact_fp32:
    """fp32 products in fp32: TF32 off while golden tensors are made."""

    def __enter__(self) -> None:
        backends = torch.backends
        self.before = (backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32)
        backends.cuda.matmul.allow_tf32 = backends.cudnn.allow_tf32 = False

    def __exit__(self, *error: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.before
