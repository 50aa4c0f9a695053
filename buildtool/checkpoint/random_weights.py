"""Seeded random weights of a given architecture: the same bytes on every machine and torch, from integer arithmetic."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from buildtool.checkpoint.configs import Config
from buildtool.store.key import digest_of

if TYPE_CHECKING:
    import torch

VERSION = 1
"""Raise it when `tensor` changes what it gives: it is in the digest."""

_CHUNK = 1 << 18  # numbers made at a time: they stay in a core's cache
_DEVICE_CHUNK = 1 << 23  # on a GPU: 64 MB as integers
# Projections that end a residual branch: halved, so that sums over 70 transformer blocks stay well inside fp16.
_BRANCH_ENDS = (
    "to_out.0.weight",
    "ff.net.2.weight",
    "proj_out.weight",
    "conv2.weight",
    "out_proj.weight",
    "fc2.weight",
)


def digest(component: str, config: Config, seed: int, dtype: str) -> str:
    """sha256 of the recipe, which stands for the weights: nothing is generated to know it."""
    return digest_of(
        {"random": VERSION, "component": component, "config": config, "seed": seed, "dtype": dtype},
    )


def load(component: str, config: Config, seed: int, dtype: str) -> Mapping[str, torch.Tensor]:
    """The component's state dict; a tensor is made when it is asked for.

    Args:
        component: its name, part of every tensor's seed.
        config: its clean config.
        seed: of the whole model.
        dtype: ``float16`` or ``float32``.
    """
    from buildtool.checkpoint import tensors

    shapes = tensors.module_shapes(component, config)

    def getter(name: str, shape: tuple[int, ...]) -> tensors.Getter:
        return lambda: tensor(f"{component}.{name.removeprefix('text_model.')}", shape, seed, dtype)

    return tensors.LazyTensors({name: getter(name, shape) for name, shape in shapes.items()})


def tensor(name: str, shape: tuple[int, ...], seed: int, dtype: str) -> torch.Tensor:
    """A tensor of uniform numbers whose mean and spread suit its name and shape.

    Weights have a standard deviation of 1/sqrt(fan in), so that activations keep their size; norms
    scale by about 1; biases are small. A process that uses a GPU anyway draws them there: the same bits.
    """
    import numpy as np
    import torch

    mean, spread = _distribution(name, shape)
    # An int32 is a uniform number in [-2^31, 2^31), whose standard deviation is 2^31 / sqrt(3).
    scale = np.float32(spread * math.sqrt(3) / 2**31)
    words = hashlib.sha256(f"{VERSION}/{seed}/{name}".encode()).digest()
    first, second = (int.from_bytes(words[i : i + 4], "little") for i in (0, 4))
    count = math.prod(shape)
    if count > _CHUNK and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with contextlib.suppress(torch.OutOfMemoryError):
            return on_device(count, (first, second), float(scale), mean, dtype, "cuda").view(shape)
    out = np.empty(count, dtype=dtype)

    def fill(start: int) -> None:
        stop = min(start + _CHUNK, out.size)
        bits = _hash(np.arange(start, stop, dtype=np.uint32), np.uint32(first), np.uint32(second)).view(np.int32)
        out[start:stop] = bits.astype(np.float32) * scale + np.float32(mean)

    list(_threads().map(fill, range(0, out.size, _CHUNK)))
    return torch.from_numpy(out).view(shape)


def on_device(count: int, words: tuple[int, int], scale: float, mean: float, dtype: str, device: str) -> torch.Tensor:
    """What :func:`tensor` draws with numpy, bit for bit, by torch on a device; flat, in main memory.

    Args:
        count: of numbers.
        words: what the counters are mixed with, 32 bits each.
        scale: a float32's value, from an int32 to the number; ``mean`` is added.
    """
    import torch

    out = torch.empty(count, dtype=getattr(torch, dtype))
    mask = 0xFFFFFFFF  # 32 bits in an int64, whose products may overflow: their low bits are right
    for start in range(0, count, _DEVICE_CHUNK):
        x = torch.arange(start, min(start + _DEVICE_CHUNK, count), device=device).bitwise_xor_(words[0])
        x ^= x >> 16
        x.mul_(0x7FEB352D).bitwise_and_(mask)
        x ^= x >> 15
        x.add_(words[1]).mul_(0x846CA68B).bitwise_and_(mask)
        x ^= x >> 16
        x -= (x >> 31) << 32
        out[start : start + len(x)] = x.float().mul_(scale).add_(mean).to(out.dtype)
    return out


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """One thread a core, each alone on its chunk: torch's own threads would meet after every operation on it."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "random weights")


def _hash(x: Any, first: Any, second: Any) -> Any:
    """Mixes uint32 counters in place, two rounds of multiply and xor-shift (after C. Wellons' lowbias32)."""
    x ^= first
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x += second
    x *= 0x846CA68B
    x ^= x >> 16
    return x


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's numbers."""
    if len(shape) < 2:
        return (1.0, 0.05) if name.endswith("weight") else (0.0, 0.02)
    if "embedding.weight" in name:
        return 0.0, 0.3
    gain = 0.5 if name.endswith(_BRANCH_ENDS) else 1.0
    return 0.0, gain / math.sqrt(math.prod(shape[1:]))
