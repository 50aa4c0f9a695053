"""The onnx backend: one ``.onnx`` a variant, without weights, which lie in the component's safetensors file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import onnx_ir
import torch
from onnx import ModelProto, TensorProto
from onnxscript import opset18
from torch import Tensor, nn

from exporters import dynamic, layout, onnx_cuda, onnx_providers, weights
from exporters.base import Exporter, ExportError, Request, StoredTensor, VariantCode
from exporters.sdxl import DTYPES, Component, Configs, example_inputs, spec_of, vae_scale_factor

op: Any = opset18  # its own annotations refuse what it does; the exporter raises the version
OPSET = 23
"""The first with Attention as one node. The CUDA provider gets :data:`exporters.onnx_cuda.OPSET` instead."""
IR_VERSION = 11
"""The one that came with opset 23; left to itself, onnx writes its newest, which runtimes of a year ago refuse."""
EMBEDDED = 1 << 16
"""Constants beyond parameters (shapes, sinusoids) are small; one of more bytes is a folded weight."""


class OnnxExporter(Exporter):
    """Exports with ``torch.onnx.export(dynamo=True)``, traced on the meta device: no weight is ever in memory."""

    name = "onnx"

    def check_request(self, request: Request) -> None:
        if request.device == "cpu" and request.precision != "fp32":
            raise ExportError(
                f"The onnx backend runs in fp32 on a CPU, not in {request.precision}.", "Use --precision fp32."
            )
        if request.precision not in ("fp32", "fp16"):
            raise ExportError(
                f"The onnx backend runs in fp32 and fp16 on a GPU, not in {request.precision}.", "Use --precision fp16."
            )
        onnx_providers.check_installed(request.options["provider"])

    def _export(
        self, component: Component, variant: str, configs: Configs, request: Request, out: Path, stem: str
    ) -> VariantCode:
        network = trace(component, variant, configs, request, _for_cuda(request))
        model = clean(network.model)
        used = attach(model, network.plan, weights.location(component.name))
        file = out / f"{stem}.onnx"
        file.write_bytes(model.SerializeToString(deterministic=True))
        return VariantCode(
            file=file.name,
            inputs=tuple(spec_of(name, tensor) for name, tensor in network.inputs.items()),
            outputs=tuple(spec_of(name, tensor) for name, tensor in network.outputs.items()),
            constants={name: name for name in used},
            tensors=network.plan,
        )


@dataclasses.dataclass(frozen=True)
class Network:
    """A traced variant: a model whose parameters are still inputs, and how those will be stored.

    ``plan`` has every parameter of the component, whether this variant reads it or not, so that the
    variants agree on where each lies in the weights file. Tensors are on the meta device.
    """

    model: ModelProto
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    plan: dict[str, StoredTensor]


def _for_cuda(request: Request) -> bool:
    return request.options.get("provider") == onnx_providers.PROVIDERS["cuda"].title


@torch.no_grad()
def trace(component: Component, variant: str, configs: Configs, request: Request, for_cuda: bool = False) -> Network:
    """The ONNX graph of a variant, as torch's exporter and onnxscript's optimizer leave it.

    Parameters become inputs before anything is optimized: what has no value can't be folded away.

    Args:
        for_cuda: whether every node has to be one that ONNX Runtime's CUDA provider has a kernel for.
    """
    module, plan = described(component, configs, request)
    _cast_sinusoids(module, DTYPES[component.precision(configs, request)])
    inputs = example_inputs(component, configs, dataclasses.replace(request, device="meta"), variant)
    program = torch.export.export(
        module, (), kwargs=inputs, strict=False, dynamic_shapes=_dynamic_shapes(inputs, configs, request)
    )
    results = [_as_traced(node.meta["val"]) for node in program.graph.find_nodes(op="output")[0].args[0]]
    exported = torch.onnx.export(
        program,
        (),
        kwargs=inputs,
        output_names=component.outputs_of(variant),
        opset_version=onnx_cuda.OPSET if for_cuda else OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
        custom_translation_table={
            torch.ops.aten.group_norm.default: _group_norm,
            **(onnx_cuda.TRANSLATIONS if for_cuda else {}),
        },
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    made = exported.model.graph
    if made.initializers.keys() - plan.keys():
        raise RuntimeError(
            f"{component.name}: the graph holds constants that are no parameters: "
            f"{sorted(made.initializers.keys() - plan.keys())[:4]}"
        )
    for name in list(made.initializers):
        value = made.initializers.pop(name)
        value.const_value = None
        made.inputs.append(value)
    exported.optimize()
    for node in made.all_nodes():  # stack traces with this machine's paths
        node.metadata_props.clear()
        node.doc_string = None
    model = onnx_ir.to_proto(exported.model)
    model.producer_name, model.producer_version = "sdxl-build", ""
    return Network(model, inputs, dict(zip(component.outputs_of(variant), results, strict=True)), plan)


def _dynamic_shapes(inputs: Mapping[str, Tensor], configs: Configs, request: Request) -> dict[str, Any] | None:
    """What of the inputs' shapes is left open: the sides of latents, as multiples of what the UNet halves them to."""
    sizes = request.options.get("dynamic")
    if sizes is None or not inputs.keys() & set(dynamic.SIZED):
        return None
    factor = vae_scale_factor(configs["vae"])
    step = dynamic.step(factor, configs["unet"])
    sides = {}
    for place, side, name in ((2, 1, "height"), (3, 0, "width")):
        least, most = sizes["min"][side] // step, sizes["max"][side] // step
        if least < most:
            sides[place] = (step // factor) * torch.export.Dim(name, min=least, max=most)
    return {name: sides if name in dynamic.SIZED else None for name in inputs}


def _as_traced(tensor: Tensor) -> Tensor:
    """The tensor with the sizes that it had while it was traced in place of open ones."""
    sizes = [size if isinstance(size, int) else size.node.hint for size in tensor.shape]
    return torch.empty(sizes, dtype=tensor.dtype, device="meta")


def described(component: Component, configs: Configs, request: Request) -> tuple[nn.Module, dict[str, StoredTensor]]:
    """A component's module on the meta device, and how its parameters will be stored: in ONNX's order, NCHW."""
    dtype = DTYPES[component.precision(configs, request)]
    graph = component.graph(configs[component.source], "meta", dtype)
    module = graph.module
    nn.Module.to(module, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return module, layout.plan(dict(module.named_parameters()), graph.sources, {})


class _Cast(nn.Module):
    """A module whose output is cast."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out.to(self.dtype)


def _cast_sinusoids(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the fp32 sinusoids of ``time_ids`` before they meet ``text_embeds``, in place.

    torch joins two dtypes and casts the result, with the same numbers; ONNX's Concat takes only one.
    """
    unet: Any = getattr(module, "model", None)
    if hasattr(unet, "add_time_proj"):
        unet.add_time_proj = _Cast(unet.add_time_proj, dtype)


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """aten::group_norm through InstanceNormalization.

    GroupNormalization would be one node, but ONNX Runtime has no kernel for it on the CPU: it runs it as
    a dozen operators with the variance as E[x²] - E[x]², which loses digits where a mean is far from
    zero (ten times the error and more in a decoder of random weights).
    """
    channels = input.shape[1]
    groups = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    one = op.CastLike(op.Constant(value_floats=[1.0] * num_groups), input)
    zero = op.CastLike(op.Constant(value_floats=[0.0] * num_groups), input)
    fixed = all(isinstance(size, int) for size in input.shape)
    shape_of_input = op.Constant(value_ints=list(input.shape)) if fixed else op.Shape(input)
    normed = op.Reshape(op.InstanceNormalization(groups, one, zero, epsilon=eps), shape_of_input)
    shape = op.Constant(value_ints=[channels] + [1] * (len(input.shape) - 2))
    scaled = normed if weight is None else op.Mul(normed, op.Reshape(weight, shape))
    return scaled if bias is None else op.Add(scaled, op.Reshape(bias, shape))


def clean(model: ModelProto) -> ModelProto:
    """The same network with constants folded and nodes that change nothing removed, shape-inferred and checked.

    Raises:
        RuntimeError: a constant is so large that it must come from a weight.
    """
    graph = gs.import_onnx(model)
    graph.fold_constants().cleanup()
    for node in list(graph.nodes):
        if _changes_nothing(node) and node.outputs[0] not in graph.outputs:
            (source, *_), (result,) = node.inputs, node.outputs
            for user in list(result.outputs):
                user.inputs = [source if each is result else each for each in user.inputs]
    graph.cleanup().toposort()
    cleaned = onnx.shape_inference.infer_shapes(gs.export_onnx(graph), strict_mode=True, data_prop=True)
    cleaned.producer_name, cleaned.ir_version = model.producer_name, IR_VERSION
    onnx.checker.check_model(cleaned, full_check=True)
    for constant in cleaned.graph.initializer:
        if len(constant.SerializeToString()) > EMBEDDED:
            raise RuntimeError(f"the graph holds a constant {constant.name} of shape {tuple(constant.dims)}")
    return cleaned


def _changes_nothing(node: gs.Node) -> bool:
    if node.op == "Identity":
        return True
    source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
    if source is None or source.dtype is None or source.shape is None or result.shape is None:
        return False
    if node.op == "Cast":
        return bool(source.dtype == result.dtype)
    static = all(isinstance(size, int) for size in source.shape)
    return node.op in ("Reshape", "Expand") and static and list(source.shape) == list(result.shape)


def attach(model: ModelProto, plan: Mapping[str, StoredTensor], location: str) -> list[str]:
    """Turns the inputs that are parameters into initializers that lie in the weights file, in place.

    Args:
        location: the weights file, relative to the model's.

    Returns:
        The parameters that the network reads.
    """
    places = weights.places(plan)
    read = {name for node in model.graph.node for name in node.input}
    given: Sequence[Any] = model.graph.input
    for value in [value for value in given if value.name in plan]:
        if value.name in read:
            model.graph.initializer.append(_external(value, plan[value.name], location, *places[value.name]))
        model.graph.input.remove(value)
    return [tensor.name for tensor in model.graph.initializer if tensor.name in plan]


def _external(value: Any, stored: StoredTensor, location: str, offset: int, length: int) -> TensorProto:
    kind = value.type.tensor_type
    dims = tuple(size.dim_value for size in kind.shape.dim)
    if dims != stored.shape or not _contiguous(stored):
        raise RuntimeError(f"{value.name} is {dims} in the graph and {stored} in the weights file")
    tensor = TensorProto(name=value.name, data_type=kind.elem_type, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, entry in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(entry))
    return tensor


def _contiguous(stored: StoredTensor) -> bool:
    return torch.empty_strided(stored.shape, stored.stride, device="meta").is_contiguous()
