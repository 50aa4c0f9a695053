"""What the onnx backend writes differently for ONNX Runtime's CUDA provider, which has kernels for fewer nodes.

A kernel serves the versions of an operator that it was registered for, and of those registered without an end only the
first: "7+" in ONNX Runtime's docs/OperatorKernels.md is no kernel for Sin of opset 22.
"""

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import opset18, values

op: Any = opset18  # its own annotations refuse what it does
OPSET = 18
"""From 19 on there are Equal and Pad without a kernel, from 22 on Sin, Cos and InstanceNormalization."""
DOMAIN = "com.microsoft"


def _contributed(name: str, inputs: tuple[str, ...], attributes: Mapping[str, OpSchema.AttrType]) -> Any:
    """One of ONNX Runtime's own operators, as far as it is used here (its docs/ContribOperators.md)."""
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(each, "T") for each in inputs],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "")],
        attributes=[OpSchema.Attribute(each, kind, required=False) for each, kind in attributes.items()],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)


_gelu_node, _tanh_gelu_node = (_contributed(name, ("X",), {}) for name in ("Gelu", "FastGelu"))
_attention_node = _contributed(
    "MultiHeadAttention",
    ("query", "key", "value"),
    {"num_heads": OpSchema.AttrType.INT, "unidirectional": OpSchema.AttrType.INT, "scale": OpSchema.AttrType.FLOAT},
)


def _typed(made: Any, like: Any, shape: list[int]) -> Any:
    """A contributed node's result with its type and shape, which ONNX can't infer."""
    made.dtype, made.shape = like.dtype, type(like.shape)(shape)
    return made


def _gelu(x: Any, approximate: str = "none") -> Any:
    """aten::gelu, one node here too: ONNX has it from opset 20 on."""
    return _typed((_gelu_node if approximate == "none" else _tanh_gelu_node)(x), x, list(x.shape))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """aten::scaled_dot_product_attention as ONNX Runtime's own MultiHeadAttention.

    Opset 18 has no attention: it would be products and a softmax, with every weight of it in memory (0.7 GB in the
    UNet at 1024x1024). This node takes flash attention where there is a kernel for the heads' size, and others where
    there is none.

    Args:
        query, key, value: (B, heads, L, head dim).
    """
    if attn_mask is not None or enable_gqa or dropout_p:
        raise RuntimeError("only attention without mask, groups and dropout is translated")
    batch, heads, length, width = query.shape
    attributes: dict[str, Any] = {"num_heads": int(heads), "unidirectional": int(is_causal)}
    if scale is not None:
        attributes["scale"] = scale
    made = _attention_node(*(_join_heads(each) for each in (query, key, value)), **attributes)
    joined = _typed(made, query, [batch, length, heads * width])
    split = op.Reshape(joined, op.Constant(value_ints=[batch, length, heads, width]))
    return op.Transpose(split, perm=[0, 2, 1, 3])


def _join_heads(x: Any) -> Any:
    """(B, heads, L, head dim) -> (B, L, heads * head dim)."""
    batch, heads, length, width = x.shape
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[batch, length, heads * width]))


def _argmax(x: Any, dim: int, keepdim: bool = False) -> Any:
    """aten::argmax of whole numbers, which the CUDA provider compares as floating point only.

    Of several largest it need not give the first: L x + L - 1 - i has only one, the same. That is exact in fp32 for
    numbers up to 2**24 / L, and CLIP's ids are (49408 of them, L = 77).
    """
    length = x.shape[dim]
    order = op.Constant(value_floats=[float(length - 1 - i) for i in range(length)])
    spread = op.Mul(op.Cast(x, to=onnx.TensorProto.FLOAT), op.Constant(value_float=float(length)))
    return op.ArgMax(op.Add(spread, order), axis=dim, keepdims=int(keepdim))


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.argmax.default: _argmax,
    torch.ops.aten.gelu.default: _gelu,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
"""torch's operators -> what they become, instead of what the exporter makes of them."""
