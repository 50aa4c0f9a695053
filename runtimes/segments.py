"""A variant in segments, run as one engine; ``--memory sequential``: the segments' weights take turns on the GPU.

All weights wait in page-locked host memory. On the device there are two buffers of the largest segment's size, and
segment k is bound once, for good, to fixed addresses in buffer k % 2. While one segment computes, the next one's
weights are copied into the other buffer, on a stream of their own.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buildtool.store.manifest import Variant
from runtimes.base import Engine
from runtimes.cuda_graph import GraphedCall


@dataclass(frozen=True)
class Span:
    """Where a segment's tensors lie among the weights: from byte ``begin`` to ``end``."""

    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class Copies:
    """Copies on a GPU's stream of its own, from page-locked memory into one of two buffers."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self._device = buffers[0].device
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(self._device))  # the buffers may be somebody's still
        self._there = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
        self._used = [torch.cuda.Event() for _ in buffers]  # type: ignore[no-untyped-call]
        for buffer in buffers:
            buffer.record_stream(self._stream)  # nobody gets their memory while a copy may be writing to it

    def start(self, side: int, to: Tensor, data: Tensor) -> None:
        """Begins as soon as the buffer isn't used any more."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._used[side])
            to.copy_(data, non_blocking=True)
            self._there[side].record(self._stream)

    def await_(self, side: int) -> None:
        """What is launched from now on runs after the copy."""
        torch.cuda.current_stream(self._device).wait_event(self._there[side])

    def used(self, side: int) -> None:
        """What was launched so far was the last that reads the buffer."""
        self._used[side].record(torch.cuda.current_stream(self._device))

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter or the driver is shutting down
            self._stream.synchronize()  # it may be reading host memory that is about to go


class PlainCopies:
    """The same on a CPU, where a copy is over when it returns."""

    def start(self, side: int, to: Tensor, data: Tensor) -> None:
        to.copy_(data)

    def await_(self, side: int) -> None: ...

    def used(self, side: int) -> None: ...


class Turns:
    """Segments' weights, of which at most two are on the device.

    Args:
        host: all segments' bytes (uint8), page-locked if the device is a GPU.
        spans: each segment's part of them, in the order in which they run, at least two.
        device: where they are needed.
    """

    def __init__(self, host: Tensor, spans: Sequence[Span], device: torch.device) -> None:
        self._host, self._spans = host, spans
        size = max(span.size for span in spans)
        with torch.inference_mode(False):  # else nobody outside of an inference mode could write to them
            self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
        self._copies: Copies | PlainCopies = Copies(self.buffers) if device.type == "cuda" else PlainCopies()
        self._holds: list[int | None] = [None, None]

    @property
    def bytes(self) -> int:
        """What the buffers take on the device."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def buffer(self, number: int) -> Tensor:
        """Where a segment's bytes are in its turn."""
        return self.buffers[number % 2][: self._spans[number].size]

    @contextlib.contextmanager
    def turn(self, number: int) -> Iterator[None]:
        """What is launched in this context, on the device's current stream, finds a segment's weights in its buffer.

        Segments take their turns in order, again and again: the next one's copy begins before this one computes.
        """
        self._bring(number)
        self._copies.await_(number % 2)
        following = (number + 1) % len(self._spans)
        if following % 2 != number % 2:  # the last and the first of an odd number have the same buffer
            self._bring(following)
        try:
            yield
        finally:
            self._copies.used(number % 2)

    def _bring(self, number: int) -> None:
        """Starts a segment's copy, unless it is there or on its way."""
        side, span = number % 2, self._spans[number]
        if self._holds[side] != number:
            self._holds[side] = number
            self._copies.start(side, self.buffer(number), self._host[span.begin : span.end])


class SegmentedEngine(Engine):
    """A variant whose parts run one after the other and hand tensors over, which are dropped after their last reader.

    Args:
        parts: their engines, in order.
        turns: brings their weights; None where all are there.
        graph: whether all of it becomes one CUDA graph; the parts have none of their own then.
    """

    def __init__(
        self,
        name: str,
        variant: Variant,
        device: torch.device,
        parts: Sequence[Engine],
        turns: Turns | None,
        graph: bool = False,
    ) -> None:
        super().__init__(name, variant, device)
        self.parts, self._turns = parts, turns
        self._graph: GraphedCall | None = None
        if graph:
            self._graph = GraphedCall(name, self._launch, variant.inputs, variant.outputs, device)
        last = {spec.name: number for number, part in enumerate(parts) for spec in part.inputs}
        self._dropped = [[name for name, at in last.items() if at == number] for number in range(len(parts))]

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """Every part's, by their own names."""
        return {name: tensor for part in self.parts for name, tensor in getattr(part, "constants", {}).items()}

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return self._launch(inputs) if self._graph is None else self._graph(inputs)

    def _launch(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        known = {spec.name: tensor for spec, tensor in zip(self.inputs, inputs, strict=True)}
        for number, part in enumerate(self.parts):
            with self._turns.turn(number) if self._turns is not None else contextlib.nullcontext():
                made = part(**{spec.name: known[spec.name] for spec in part.inputs})
            for name in self._dropped[number]:
                del known[name]
            known.update(zip((spec.name for spec in part.outputs), made, strict=True))
        return tuple(known[spec.name] for spec in self.outputs)


def forms(variant: Variant) -> list[Variant]:
    """The parts of a variant, each as if it were one."""
    return [
        Variant(file=p.file, inputs=p.inputs, outputs=p.outputs, constants=p.constants, check=variant.check)
        for p in variant.segments
    ]
