"""Writes a component's weights file: safetensors, each tensor flat and in physical order.

Loading is then a copy and nothing else. Tensors start at multiples of 256 bytes from a page
boundary, which compiled kernels' vector loads rely on; safetensors allows no holes, so each is
stored with the zeros that follow it. The manifest has the shapes and strides.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters import fp8
from exporters.base import ExportError, StoredTensor

SPARED = "token_embedding.weight"
"""A table that may have more rows than the checkpoint's, for words that come later."""
ALIGNMENT = 256
PAGE = 4096
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}


def write(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    source: Mapping[str, Tensor],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """Streams the tensors of a plan into ``path``, two in memory at a time: one is written while the next is made.

    Args:
        path: the safetensors file to write.
        tensors: the plan, from :func:`exporters.layout.plan`; the file's order is that of the names.
        source: the checkpoint's tensors by name.
        progress: called with (bytes written, bytes in all).

    Returns:
        The file's sha256, as 64 hex digits.

    Raises:
        ExportError: the checkpoint lacks a tensor or has another shape than the plan.
    """
    header, total = _header(tensors)
    digest = hashlib.sha256()
    under_way: list[Future[Any]] = []

    # Both let other threads run while they work.
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(2, "weights") as pool:

        def settle() -> None:
            while under_way:
                under_way.pop().result()

        def put(data: Any) -> None:
            settle()
            under_way.extend((pool.submit(digest.update, data), pool.submit(_write_all, file, data)))

        put(header)
        done = 0
        for name, stored in sorted(tensors.items()):
            data = physical(name, stored, source)
            put(data.view(torch.uint8).numpy().data)
            padding = _padded(data.nbytes) - data.nbytes
            if padding:
                put(b"\0" * padding)
            done += data.nbytes + padding
            progress(done, total)
        settle()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_all(file: Any, data: Any) -> None:
    """An unbuffered file takes 2 GB at a time at most."""
    left = memoryview(data)
    while left.nbytes:
        left = left[file.write(left) :]


def location(component: str) -> str:
    """A component's weights file, in the artifact's folder and as its code names it."""
    return f"weights/{component}.safetensors"


def places(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, int]]:
    """Where each tensor of a plan will lie in the file that :func:`write` makes of it: (offset, bytes).

    Code that is compiled before the file exists relies on this: a file that is written in another
    way wants a new ``version`` in the rows of :data:`exporters.registry.BACKENDS`.
    """
    header, _ = _header(tensors)
    found = {}
    offset = len(header)
    for name, _, width, size in _sizes(tensors):
        found[name] = (offset, _numel(tensors[name].shape) * width)
        offset += size
    return found


def physical(name: str, stored: StoredTensor, source: Mapping[str, Tensor]) -> Tensor:
    """A stored tensor's elements in memory order: one dimension, contiguous, on the CPU."""
    dtype: torch.dtype = getattr(torch, stored.dtype)
    try:
        parts = [source[s] for s in stored.sources]
    except KeyError as error:
        raise ExportError(f"The checkpoint has no tensor {error.args[0]!r}, which the compiled code reads.") from None
    if stored.recipe:
        logical = fp8.derive(stored.recipe, parts)
    else:
        logical = torch.cat(parts) if len(parts) > 1 else parts[0]
    if len(stored.shape) == 1:
        logical = logical.flatten()
    missing = stored.shape[0] - logical.shape[0]
    if missing > 0 and (len(stored.shape) == 1 or name.endswith(SPARED)):
        logical = torch.cat([logical, logical.new_zeros(missing, *logical.shape[1:])])
    if tuple(logical.shape) != stored.shape:
        raise ExportError(
            f"The checkpoint's {stored.sources[0]} has shape {tuple(logical.shape)}; "
            f"the compiled code reads {stored.shape}."
        )
    out = torch.empty_strided(stored.shape, stored.stride, dtype=dtype)
    out.copy_(logical)
    return out.as_strided((out.numel(),), (1,))


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _sizes(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str, int, int]]:
    for name, stored in sorted(tensors.items()):
        width = torch.empty(0, dtype=getattr(torch, stored.dtype)).element_size()
        yield name, NAMES[stored.dtype], width, _padded(_numel(stored.shape) * width)


def _header(tensors: Mapping[str, StoredTensor]) -> tuple[bytes, int]:
    """safetensors' header, filled up with spaces so that the data begins on a page."""
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, width, size in _sizes(tensors):
        entries[name] = {"dtype": dtype, "shape": [size // width], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE)
    return struct.pack("<Q", len(text)) + text, offset
