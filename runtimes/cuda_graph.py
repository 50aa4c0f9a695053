"""Calls recorded as CUDA graphs: thousands of launches replayed as one."""

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from buildtool.store.manifest import TensorSpec
from runtimes import timeline
from runtimes.gpu_upload import DriverError
from runtimes.memset_nodes import MemsetNodes

log = logging.getLogger("runtimes")

Function = Callable[[list[Tensor]], Sequence[Tensor]]


_postponed = contextvars.ContextVar("postponed", default=False)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Nothing is recorded inside: a single picture is there sooner without, and launches keep ahead of the GPU."""
    token = _postponed.set(True)
    try:
        yield
    finally:
        _postponed.reset(token)


class GraphPool:
    """The memory that the graphs of one device share, and the stream on which they are recorded.

    Every graph's intermediate tensors lie in the same blocks, so several cost what the largest takes.
    That is safe because graphs run one after the other and what outlives a call (inputs, outputs) lies
    elsewhere.
    """

    _pools: dict[torch.device, "GraphPool"] = {}  # noqa: RUF012
    _wanted: dict[torch.device, int] = {}  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.memsets = MemsetNodes()
        self._reserved = 0

    @property
    def handle(self) -> Any:
        return self.memory.id

    @classmethod
    def of(cls, device: torch.device) -> "GraphPool":
        if device not in cls._pools:
            cls._pools[device] = cls(device)
        return cls._pools[device]

    @classmethod
    def want(cls, device: torch.device, size: int) -> None:
        """Has the device's pool begin with a block of so many bytes, if it is the most that was wanted.

        A pool that grows block by block, for small calls first, ends with holes as large as what is in it.
        """
        cls._wanted[device] = max(size, cls._wanted.get(device, 0))

    def reserve(self, device: torch.device) -> None:
        """Takes the block that is wanted. What is computed on the pool's stream, in the pool, comes out of it.

        Where there is no room for all of it, the pool grows as it is needed.
        """
        wanted = self._wanted.get(device, 0)
        if wanted > self._reserved:
            self._reserved = wanted
            try:
                with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.memory):
                    torch.empty(wanted, dtype=torch.uint8, device=device)
            except torch.OutOfMemoryError:
                log.info(
                    "The GPU has no room for a block of %.1f GB: the pool of CUDA graphs grows in pieces.", wanted / 1e9
                )

    @classmethod
    def empty(cls, device: torch.device) -> None:
        """Gives a device's memory back, if no graph lies in it any more.

        The stream stays: cuBLAS keeps a workspace for each stream that it has seen.
        """
        pool = cls._pools.get(device)
        if pool is not None and pool.memory.use_count() == 1:  # torch aborts if a pool goes before its graphs
            pool.memory = torch.cuda.MemPool()
            pool._reserved = 0


class GraphedCall:
    """A function of fixed tensors as a CUDA graph, recorded at its first call.

    What the function reads besides its inputs (weights) has to stay where it is; :meth:`forget` makes
    the next call record anew.

    Args:
        name: for messages.
        function: inputs in order -> outputs in order, on the device's current stream.
        inputs, outputs: their shapes, dtypes and strides.
        device: a CUDA device.
    """

    def __init__(
        self,
        name: str,
        function: Function,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        device: torch.device,
    ) -> None:
        self._name, self._function, self._device = name, function, device
        self._specs = (inputs, outputs)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ran = False
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs: buffers of this call's own, which the next one overwrites."""
        if self._graph is None:
            what = "first run" if _postponed.get() else "record"
            with contextlib.nullcontext() if self.settled else timeline.span(f"{what} {self._name}"):
                if _postponed.get():
                    self._once(inputs)
                    return tuple(self._outputs)
                self._record(inputs)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        assert self._graph is not None
        self._graph.replay()
        return tuple(self._outputs)

    @property
    def settled(self) -> bool:
        """Whether the next call only computes: it isn't the first, and records nothing."""
        return self._graph is not None or (self._ran and _postponed.get())

    def forget(self, why: str) -> None:
        """Drops the graph; the next call records another."""
        if self._graph is not None:
            log.info("%s: its CUDA graph is recorded again: %s.", self._name, why)
            self._graph = None
            self._ran = False  # TensorRT has to run once where its memory has moved, before it is recorded

    def _once(self, inputs: Sequence[Tensor]) -> None:
        """Computes without recording."""
        pool, current = GraphPool.of(self._device), torch.cuda.current_stream(self._device)
        if not self._inputs:
            self._inputs, self._outputs = ([_empty(spec, self._device) for spec in specs] for specs in self._specs)
        for static, given in zip(self._inputs, inputs, strict=True):
            static.copy_(given)
        pool.stream.wait_stream(current)
        pool.reserve(self._device)
        # What it computes lies in the pool already, or a second resolution's first call would need as much again.
        with torch.cuda.stream(pool.stream), torch.cuda.use_mem_pool(pool.memory):
            self._run()
        current.wait_stream(pool.stream)
        self._ran = True

    def _record(self, inputs: Sequence[Tensor]) -> None:
        pool = GraphPool.of(self._device)
        if not self._ran:  # once without recording: libraries load their kernels, choose algorithms and take workspaces
            self._once(inputs)
        pool.stream.wait_stream(torch.cuda.current_stream(self._device))
        pool.stream.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        # thread_local: other threads may allocate meanwhile (weights are still being uploaded).
        with torch.cuda.graph(graph, pool=pool.handle, stream=pool.stream, capture_error_mode="thread_local"):
            self._run()
        self._mend(graph, pool.memsets)
        graph.instantiate()
        self._graph = graph

    def _mend(self, graph: torch.cuda.CUDAGraph, memsets: MemsetNodes) -> None:
        """Memsets as kernels, which the GPU comes to sooner."""
        try:
            count = memsets.replace(graph.raw_cuda_graph())
            log.debug("%s: %d memsets of its CUDA graph became kernels.", self._name, count)
        except (DriverError, AttributeError) as error:
            log.info("%s: memsets of its CUDA graph stay as they are, which is slower: %s.", self._name, error)

    def _run(self) -> None:
        # Outputs are copied out of the pool, which the next graph to run overwrites.
        for static, made in zip(self._outputs, self._function(self._inputs), strict=True):
            static.copy_(made)


def _empty(spec: TensorSpec, device: torch.device) -> Tensor:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    with torch.inference_mode(False):  # else nobody outside of an inference mode could write to it again
        return torch.empty_strided(spec.shape, spec.stride, dtype=dtype, device=device)
