"""Memset nodes replaced by kernels, with a stand-in for libcuda that keeps a graph of nodes and edges."""

import ctypes
import itertools
from typing import Any

import pytest

from runtimes.gpu_upload import DriverError
from runtimes.memset_nodes import MOST_WORDS, MemsetNodes, _Kernel, _Memset

KERNEL, MEMSET = 0, 2


class StandInCuda:
    """The functions of libcuda that change a graph. Nodes are numbers; edges carry the driver's 8 bytes."""

    def __init__(self) -> None:
        self.kinds: dict[int, int] = {}
        self.memsets: dict[int, dict[str, int]] = {}
        self.kernels: dict[int, tuple[int, ...]] = {}
        self.edges: dict[tuple[int, int], int] = {}
        self.refused = ""
        self.last = 100

    def add(self, kind: int, **memset: int) -> int:
        self.last += 1
        node = self.last
        self.kinds[node] = kind
        if memset:
            self.memsets[node] = {"pitch": 0, "value": 0, "element": 4, "height": 1, **memset}
        return node

    def chain(self, *nodes: int, data: int = 0) -> None:
        self.edges.update({pair: data for pair in itertools.pairwise(nodes)})

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name == object.__getattribute__(self, "refused"):
            return lambda *arguments: 801
        return object.__getattribute__(self, name)

    def cuModuleLoadData(self, module, image):
        assert b".entry fill" in image.value
        return 0

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 7
        return 0

    def cuGraphGetNodes(self, graph, nodes, count):
        count._obj.value = len(self.kinds)
        for i, node in enumerate(self.kinds if nodes is not None else ()):
            nodes[i] = node
        return 0

    def cuGraphNodeGetType(self, node, kind):
        kind._obj.value = self.kinds[node.value]
        return 0

    def cuGraphMemsetNodeGetParams(self, node, parameters):
        for name, value in self.memsets[node.value].items():
            setattr(parameters._obj, name, value)
        return 0

    def _side(self, found, nodes, data, count):
        count._obj.value = len(found)
        for i, (node, edge) in enumerate(found if nodes is not None else ()):
            nodes[i], data[i] = node, edge
        return 0

    def cuGraphNodeGetDependencies_v2(self, node, nodes, data, count):
        return self._side([(a, e) for (a, b), e in self.edges.items() if b == node.value], nodes, data, count)

    def cuGraphNodeGetDependentNodes_v2(self, node, nodes, data, count):
        return self._side([(b, e) for (a, b), e in self.edges.items() if a == node.value], nodes, data, count)

    def cuGraphAddKernelNode_v2(self, made, graph, before, count, parameters):
        kernel: _Kernel = parameters._obj
        types = (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
        values = [t.from_address(kernel.parameters[i]).value for i, t in enumerate(types)]
        made._obj.value = self.add(KERNEL)
        self.kernels[made._obj.value] = (kernel.function, *values, kernel.grid[0] * kernel.block[0])
        self.edges.update({(before[i], made._obj.value): 0 for i in range(count.value)})
        return 0

    def cuGraphAddDependencies_v2(self, graph, from_, to, data, count):
        self.edges.update({(from_[i], to[i]): data[i] for i in range(count.value)})
        return 0

    def cuGraphDestroyNode(self, node):
        del self.kinds[node.value]
        self.edges = {pair: data for pair, data in self.edges.items() if node.value not in pair}
        return 0


def test_a_memset_between_two_kernels_becomes_a_kernel_in_its_place() -> None:
    cuda = StandInCuda()
    first, zero, last = cuda.add(KERNEL), cuda.add(MEMSET, to=4096, width=1001), cuda.add(KERNEL)
    cuda.chain(first, zero)
    cuda.chain(zero, last, data=1 << 16)
    assert MemsetNodes(cuda).replace(1) == 1
    ((made, (function, to, value, words, threads)),) = cuda.kernels.items()
    assert (function, to, value, words) == (7, 4096, 0, 1001) and threads >= words
    assert zero not in cuda.kinds
    assert cuda.edges == {(first, made): 0, (made, last): 1 << 16}


def test_a_memset_at_the_start_and_at_the_end_of_a_graph() -> None:
    cuda = StandInCuda()
    zero, middle, last = cuda.add(MEMSET, to=64, width=1), cuda.add(KERNEL), cuda.add(MEMSET, to=128, width=2)
    cuda.chain(zero, middle, last)
    assert MemsetNodes(cuda).replace(1) == 2
    start, end = sorted(cuda.kernels)
    assert set(cuda.edges) == {(start, middle), (middle, end)}


@pytest.mark.parametrize(("element", "value", "word"), [(1, 0xAB, 0xABABABAB), (2, 0xABCD, 0xABCDABCD), (4, 9, 9)])
def test_its_value_is_repeated_to_a_word(element: int, value: int, word: int) -> None:
    cuda = StandInCuda()
    cuda.add(MEMSET, to=64, value=value, element=element, width=8)
    assert MemsetNodes(cuda).replace(1) == 1
    assert [(made[2], made[3]) for made in cuda.kernels.values()] == [(word, 8 * element // 4)]


@pytest.mark.parametrize(
    "memset",
    [
        {"to": 64, "width": 8, "height": 2},
        {"to": 66, "width": 8},
        {"to": 64, "width": 7, "element": 1},
        {"to": 64, "width": MOST_WORDS + 1},
    ],
)
def test_others_stay(memset: dict[str, int]) -> None:
    cuda = StandInCuda()
    node = cuda.add(MEMSET, **memset)
    assert MemsetNodes(cuda).replace(1) == 0
    assert node in cuda.kinds and not cuda.kernels


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuGraphAddKernelNode_v2", "cuGraphAddDependencies_v2"])
def test_a_refusal_leaves_the_memset(call: str) -> None:
    cuda = StandInCuda()
    first, zero, last = cuda.add(KERNEL), cuda.add(MEMSET, to=64, width=8), cuda.add(KERNEL)
    cuda.chain(first, zero, last)
    cuda.refused = call
    with pytest.raises(DriverError, match=call):
        MemsetNodes(cuda).replace(1)
    assert {(first, zero), (zero, last)} <= set(cuda.edges)


def test_the_structures_have_the_drivers_sizes() -> None:
    assert ctypes.sizeof(_Memset) == 40 and ctypes.sizeof(_Kernel) == 72
