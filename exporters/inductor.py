"""What torch's compiler, left to itself, does slowly, or makes slow kernels of: each with its measured reason."""

import contextlib
import importlib
import unittest.mock
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

WIDEST_ROW = 2048
"""Rows of up to this many elements are reduced in one go: LayerNorms of SDXL have 640 and 1,280."""


@contextlib.contextmanager
def choices() -> Iterator[None]:
    """Makes a LayerNorm of 1,280 channels read its row once.

    Inductor holds rows of up to 1,024 elements in registers; it reads longer ones twice.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            size = features.reduction_numel
            inner = features.get_reduction_hint() == ReductionHint.INNER and not cooperative_reduction
            if inner and size.is_number and int(size) <= WIDEST_ROW:
                return True
            return InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)

    with V.set_choices_handler(Choices()):
        yield


def only_user(node: fx.Node) -> fx.Node | None:
    """What alone reads a node's result; None if that is nobody or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def join_channels_last(graph: fx.Graph) -> int:
    """Lets feature maps (B, C, H, W) that are joined by channels lie channels-last, as convolutions want; in place.

    The result of ``cat`` lies channels-first otherwise. What normalizes it then reads one layout and writes the other:
    239 us for a map that takes 45 (960 channels of 128x128 on an H100).

    Returns:
        How many there were.
    """
    cat, permute = torch.ops.aten.cat.default, torch.ops.aten.permute.default
    found = 0
    for node in list(graph.find_nodes(op="call_function", target=cat)):
        tensors, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if dim not in (1, -3) or any(tensor.meta["val"].ndim != 4 for tensor in tensors):
            continue
        with graph.inserting_before(node):
            rows = [graph.call_function(permute, (tensor, [0, 2, 3, 1])) for tensor in tensors]
            joined = graph.call_function(cat, (rows, 3))
            back = graph.call_function(permute, (joined, [0, 3, 1, 2]))
        for made, like in [*zip(rows, tensors, strict=True), (back, node)]:
            made.meta = dict(like.meta)
        for row, tensor in zip(rows, tensors, strict=True):
            row.meta["val"] = tensor.meta["val"].permute(0, 2, 3, 1)
        joined.meta = {**node.meta, "val": node.meta["val"].permute(0, 2, 3, 1).contiguous()}
        back.meta["val"] = joined.meta["val"].permute(0, 3, 1, 2)
        node.replace_all_uses_with(back)
        graph.erase_node(node)
        found += 1
    return found


@contextlib.contextmanager
def quicker() -> Iterator[None]:
    """The same code sooner.

    - What one of our Triton kernels writes to is found by compiling it: at each of its calls, three times over. Once
      for each kind of arguments will do: it was 15 s of the VAE's compiler on an H100.
    - The graph is printed as a program that repeats the compilation, for a log that nobody asked for.
    """
    from torch._dynamo.repro import after_aot
    from torch._higher_order_ops import triton_kernel_wrap

    with contextlib.ExitStack() as stack:
        for name in ("identify_accessed_tensors", "identify_mutated_tensors"):  # torch 2.13's name, and that before
            if hasattr(triton_kernel_wrap, name):
                remembering = remembered(getattr(triton_kernel_wrap, name))
                stack.enter_context(unittest.mock.patch.object(triton_kernel_wrap, name, remembering))
        stack.enter_context(unittest.mock.patch.object(after_aot, "save_graph_repro", lambda *_, **__: None))
        yield


Identify = Callable[[Any, Mapping[str, Any], Mapping[str, Any]], Any]


def remembered(identify: Identify) -> Identify:
    """What a Triton kernel reads and writes, for arguments of the same dtypes and the same other values."""
    found: dict[object, Any] = {}

    def again(kernel: Any, kwargs: Mapping[str, Any], tma_descriptor_metadata: Mapping[str, Any]) -> Any:
        values = tuple((name, type(value), getattr(value, "dtype", value)) for name, value in kwargs.items())
        key = (id(kernel), values, repr(tma_descriptor_metadata))
        if not _has_hash(key):
            return identify(kernel, kwargs, tma_descriptor_metadata)
        if key not in found:
            found[key] = identify(kernel, kwargs, tma_descriptor_metadata)
        return found[key]

    return again


def _has_hash(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@contextlib.contextmanager
def scratch_for_all() -> Iterator[None]:
    """Gives each program of a Triton kernel the memory that it asks for, as where it describes a tensor to the GPU.

    Up to torch 2.11 at least, compiled code allocates one program's for all of them, and they write beyond it.
    """
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    allocate = CUDADeviceOpOverrides.cpp_scratch

    def cpp_scratch(self: Any, idx: int, workspace: Any, prefix: str | None = None) -> Any:
        made = allocate(self, idx, workspace, prefix)
        if not made:
            return made
        one = f"{{{workspace.size}}}"
        every = f"{{static_cast<int64_t>({workspace.size}) * grid_0 * grid_1 * grid_2}}"
        lines, name = made
        lines = [line.replace(one, every) for line in lines]
        if workspace.size and not any("grid_0" in line for line in lines):
            raise RuntimeError(f"torch {torch.__version__} allocates scratch memory in an unknown way: {lines}")
        return lines, name

    with unittest.mock.patch.object(CUDADeviceOpOverrides, "cpp_scratch", cpp_scratch):
        yield


def compute_keys() -> None:
    """Has torch and Triton compute what they name their caches by: hashes of all that they are, once a process."""
    for module, name in (("torch._inductor.codecache", "torch_key"), ("triton.runtime.cache", "triton_key")):
        with contextlib.suppress(ImportError, AttributeError):
            getattr(importlib.import_module(module), name)()
