"""Memsets of a recorded CUDA graph as kernels.

cuBLASLt and cuDNN zero a few bytes before many of their kernels: 235 times in a step of SDXL's UNet. A memset node is
run by another part of the GPU than kernels are, and the way there and back takes microseconds; between two
kernels it is half of one. The driver is called through ctypes: torch has no call that changes a graph.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

from runtimes.gpu_upload import call

THREADS = 256
MOST_WORDS = 1 << 20
"""Larger memsets stay: their own work outweighs the way there."""
_MEMSET = 2  # CUgraphNodeType

# A thread a word. The driver compiles it for the GPU that is there.
FILL = b"""
.version 7.0
.target sm_70
.address_size 64
.visible .entry fill(.param .u64 to, .param .u32 value, .param .u32 words)
{
    .reg .pred %p;
    .reg .b32 %r<6>;
    .reg .b64 %d<4>;
    ld.param.u64 %d0, [to];
    ld.param.u32 %r0, [value];
    ld.param.u32 %r1, [words];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.s32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p, %r5, %r1;
    @%p ret;
    cvta.to.global.u64 %d1, %d0;
    mul.wide.u32 %d2, %r5, 4;
    add.s64 %d3, %d1, %d2;
    st.global.u32 [%d3], %r0;
    ret;
}
"""


class _Memset(ctypes.Structure):
    """CUDA_MEMSET_NODE_PARAMS"""

    _fields_ = (
        ("to", ctypes.c_uint64),
        ("pitch", ctypes.c_size_t),
        ("value", ctypes.c_uint),
        ("element", ctypes.c_uint),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    )


class _Kernel(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2"""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class _Edges:
    """The nodes on one side of a node, with what the driver says of each edge (8 bytes)."""

    count: int
    nodes: Any
    data: Any


class MemsetNodes:
    """Replaces memset nodes, on the device whose context is current.

    Args:
        library: libcuda, or a stand-in with its functions.
    """

    def __init__(self, library: Any = None) -> None:
        self.library = library if library is not None else ctypes.CDLL("libcuda.so.1")
        self._fill: ctypes.c_void_p | None = None

    def replace(self, graph: int) -> int:
        """Makes kernels of a graph's memsets, before it is instantiated.

        At any failure the graph still computes the same: a memset goes only when its kernel stands in its place.

        Args:
            graph: its handle (CUgraph).

        Returns:
            How many were replaced.

        Raises:
            DriverError: the driver refused a call.
            AttributeError: it is too old to have one.
        """
        if self._fill is None:
            self._fill = self._load()
        return sum(self._replace(graph, node) for node in self._nodes(graph))

    def _call(self, name: str, *arguments: Any) -> None:
        call(self.library, name, *arguments)

    def _load(self) -> ctypes.c_void_p:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(FILL))
        self._call("cuModuleGetFunction", ctypes.byref(function), module, b"fill")
        return function

    def _nodes(self, graph: int) -> list[ctypes.c_void_p]:
        count = ctypes.c_size_t()
        self._call("cuGraphGetNodes", ctypes.c_void_p(graph), None, ctypes.byref(count))
        nodes = (ctypes.c_void_p * count.value)()
        self._call("cuGraphGetNodes", ctypes.c_void_p(graph), nodes, ctypes.byref(count))
        kind = ctypes.c_int()
        found = []
        for handle in nodes[: count.value]:
            node = ctypes.c_void_p(handle)
            self._call("cuGraphNodeGetType", node, ctypes.byref(kind))
            if kind.value == _MEMSET:
                found.append(node)
        return found

    def _replace(self, graph: int, node: ctypes.c_void_p) -> bool:
        memset = _Memset()
        self._call("cuGraphMemsetNodeGetParams", node, ctypes.byref(memset))
        words, rest = divmod(memset.width * memset.element, 4)
        if memset.height != 1 or rest or memset.to % 4 or not 0 < words <= MOST_WORDS:
            return False
        value = memset.value
        for size in (1, 2):  # a byte or half a word, repeated
            if memset.element <= size:
                value = (value & ((1 << 8 * size) - 1)) * (1 + (1 << 8 * size))
        before = self._edges("cuGraphNodeGetDependencies_v2", node)
        after = self._edges("cuGraphNodeGetDependentNodes_v2", node)
        kernel = self._kernel(memset.to, value, words)
        made = ctypes.c_void_p()
        self._call(
            "cuGraphAddKernelNode_v2",
            ctypes.byref(made),
            ctypes.c_void_p(graph),
            before.nodes,
            ctypes.c_size_t(before.count),
            ctypes.byref(kernel),
        )
        made_each = (ctypes.c_void_p * max(after.count, 1))(*[made.value] * after.count)
        edges = (ctypes.c_void_p(graph), made_each, after.nodes, after.data, ctypes.c_size_t(after.count))
        self._call("cuGraphAddDependencies_v2", *edges)
        self._call("cuGraphDestroyNode", node)
        return True

    def _edges(self, call: str, node: ctypes.c_void_p) -> _Edges:
        count = ctypes.c_size_t()
        self._call(call, node, None, None, ctypes.byref(count))
        nodes, data = (ctypes.c_void_p * max(count.value, 1))(), (ctypes.c_uint64 * max(count.value, 1))()
        if count.value:
            self._call(call, node, nodes, data, ctypes.byref(count))
        return _Edges(count.value, nodes, data)

    def _kernel(self, to: int, value: int, words: int) -> _Kernel:
        """The node's parameters; the driver copies what they point to when the node is made."""
        held = (ctypes.c_uint64(to), ctypes.c_uint32(value), ctypes.c_uint32(words))
        pointers = (ctypes.c_void_p * len(held))(*[ctypes.addressof(each) for each in held])
        made = _Kernel(
            function=self._fill,
            grid=(-(-words // THREADS), 1, 1),
            block=(THREADS, 1, 1),
            parameters=ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p)),
        )
        made.held = (held, pointers)
        return made
