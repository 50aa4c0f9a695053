"""The kernels that ONNX Runtime's CUDA provider has for what the onnx backend emits.

From docs/OperatorKernels.md of microsoft/onnxruntime at commit 001d12d2623fd411ce0f83d05abb5e82304a3389 (the table that
has Attention-24 and TensorScatter), section CUDAExecutionProvider; versions from opset 13 on, types that SDXL's graphs
have. A kernel without an end serves only the operator's version that it names (KernelRegistry, ONNX Runtime's
kernel_registry.cc): an H100 with onnxruntime-gpu 1.30 refused Sin, Cos and InstanceNormalization of version 22.
"""

from typing import Any

import onnx

FLOATING = {"float", "float16"}
INDICES = {"int32", "int64"}
ANY = FLOATING | INDICES | {"bool"}

KERNELS: dict[str, list[tuple[int, int | None, set[str]]]] = {
    "Add": [(13, 13, FLOATING | INDICES), (14, None, FLOATING | INDICES)],
    "ArgMax": [(13, None, FLOATING)],
    "Attention": [(23, 23, FLOATING), (24, None, FLOATING)],
    "Cast": [(13, 18, ANY), (19, 20, ANY), (21, 22, ANY), (23, None, ANY)],
    "Concat": [(13, None, ANY)],
    "Conv": [(11, 21, FLOATING), (22, None, FLOATING)],
    "Cos": [(7, None, FLOATING)],
    "Div": [(13, 13, FLOATING | INDICES), (14, None, FLOATING | INDICES)],
    "Equal": [(13, None, FLOATING | INDICES | {"bool"})],
    "Expand": [(13, None, ANY)],
    "Gather": [(13, None, ANY)],
    "GatherND": [(13, None, FLOATING | {"int64"})],
    "Gelu": [(20, None, FLOATING)],
    "Gemm": [(13, None, FLOATING)],
    "InstanceNormalization": [(6, None, FLOATING)],
    "LayerNormalization": [(17, None, FLOATING)],
    "MatMul": [(13, None, FLOATING)],
    "Mul": [(13, 13, FLOATING | INDICES), (14, None, FLOATING | INDICES)],
    "Pad": [(13, 17, FLOATING | {"bool"}), (18, None, FLOATING | {"bool"})],
    "Relu": [(13, 13, FLOATING), (14, None, FLOATING)],
    "Reshape": [(14, 18, ANY), (19, 20, ANY), (21, 22, ANY), (23, None, ANY)],
    "Resize": [(13, 17, FLOATING), (18, 18, FLOATING), (19, None, FLOATING)],
    "Sigmoid": [(13, None, FLOATING)],
    "Sin": [(7, None, FLOATING)],
    "Slice": [(13, None, ANY)],
    "Split": [(13, 17, ANY), (18, None, ANY)],
    "Squeeze": [(13, 20, ANY), (21, 22, ANY), (23, None, ANY)],
    "Sub": [(13, 13, FLOATING | INDICES), (14, None, FLOATING | INDICES)],
    "Tanh": [(13, None, FLOATING)],
    "Transpose": [(13, 20, ANY), (21, 22, ANY), (23, None, ANY)],
    "Unsqueeze": [(13, 20, ANY), (21, 22, ANY), (23, None, ANY)],
    "com.microsoft.FastGelu": [(1, None, FLOATING)],
    "com.microsoft.Gelu": [(1, None, FLOATING)],
    "com.microsoft.MultiHeadAttention": [(1, None, FLOATING)],
}
"""Operator -> (first version, last version, types of its first input)."""


def without_kernel(model: Any) -> set[str]:
    """What of a model's nodes the CUDA provider would leave to the CPU: ``Sin-22(float)``.

    Args:
        model: a ModelProto with inferred shapes.
    """
    versions = {entry.domain: entry.version for entry in model.opset_import}
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    missing = set()
    for node in graph.node:
        version, name = 1, f"{node.domain}.{node.op_type}"
        if not node.domain:
            name, version = node.op_type, onnx.defs.get_schema(node.op_type, versions[""]).since_version
        kind = onnx.helper.tensor_dtype_to_string(kinds[node.input[0]]).rpartition(".")[2].lower()
        fits = [
            kind in types and (version == first if last is None else first <= version <= last)
            for first, last, types in KERNELS.get(name, [])
        ]
        if not any(fits):
            missing.add(f"{name}-{version}({kind})")
    return missing
