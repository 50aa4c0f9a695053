"""Stores what engines have in common once: an engine file becomes pieces of shared files and what is its own.

TensorRT writes a network's weights into every engine, most of them as the same bytes in the same order: for both
variants of a UNet, for every resolution, batch and target. Where they lie differs, by the code before them. So the
first engine of a checkpoint's component is kept as a blob of its own, a *part*, and every engine, the first one too, is
kept as the list of the parts' pieces that it consists of, and the bytes that no part has. Where those are many (weights
that one variant holds in another order), they become another part. runtimes/trt_pieces.py puts engines together again.

File format: ``MAGIC``, the header's length (8 bytes, little-endian), the header (JSON), the engine's own bytes. The
header has the engine's ``size`` and ``sha256``; ``parts``: the sha256 of each part; and ``pieces``: ``[part, offset,
size]`` in the engine's order, with part -1 for its own bytes.
"""

import contextlib
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"SDXLPCS1"
WORD = 8
STRIDE = 16 << 10
"""One word of the shared file in so many bytes can be found in an engine."""
WINDOW = 1 << 20
"""So much of an engine is looked through at once."""
WORTH = 64 << 10
"""Shorter pieces than this stay the engine's own."""
CHUNK = 16 << 20

OWN = 16
"""If more than one in so many bytes is in no part, these make a part."""

ALIGNMENT = 64
"""Engines align tensors to this, so words of a part are found in another engine if parts keep to it."""

Bytes = NDArray[np.uint8]
Piece = tuple[int, int, int]


def part_name(component: str, digest: str) -> str:
    """A part's file in an artifact's folder."""
    return f"weights/{component}-{digest[:12]}.part"


def parts_of(engine: Path) -> list[str]:
    """The digests of the parts that a split engine consists of."""
    with open(engine, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            return []
        (length,) = struct.unpack("<Q", file.read(8))
        found: list[str] = json.loads(file.read(length))["parts"]
    return found


def split(engine: Path, known: Mapping[str, Path]) -> dict[str, Path]:
    """Replaces an engine's file by pieces of parts and what is its own.

    Args:
        known: digest -> file of the parts that there are.

    Returns:
        The part, if any, that had to be made: digest -> its file, beside the engine.
    """
    made: dict[str, Path] = {}
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(_mapped(engine))
        bases = [stack.enter_context(_mapped(path)) for path in known.values()]
        found = pieces(new, bases)
        digest, names = hashlib.sha256(new.data).hexdigest(), list(known)
        own = sum(size for part, _, size in found if part < 0)
        if own * OWN > len(new):
            file_of_own = engine.with_name(f"{engine.name}.part")
            if own == len(new):
                os.link(engine, file_of_own)  # gigabytes that needn't be copied
            else:
                with open(file_of_own, "wb") as file:
                    _write_own(file, new, found)
            with _mapped(file_of_own) as written:
                made[hashlib.sha256(written.data).hexdigest()] = file_of_own
            names += made
        used = sorted({part for part, _, _ in found if part >= 0} | ({len(bases)} if made else set()))
        rows, at = [], 0
        for part, offset, size in found:
            place = part if part >= 0 else (len(bases) if made else -1)
            if part < 0:
                offset = at = _aligned(at, offset)
                at += size
            rows.append((used.index(place) if place >= 0 else -1, offset, size))
        header = json.dumps(
            {"size": len(new), "sha256": digest, "parts": [names[i] for i in used], "pieces": rows},
            separators=(",", ":"),
        ).encode()
        staged = engine.with_name(f"{engine.name}.split")
        with open(staged, "wb") as file:
            file.write(MAGIC + struct.pack("<Q", len(header)) + header)
            if not made:
                _write_own(file, new, found)
    staged.replace(engine)
    return made


def _write_own(file: BinaryIO, new: Bytes, found: Sequence[Piece]) -> None:
    """Writes the pieces that no part has, each as far from a multiple of ``ALIGNMENT`` as in the engine."""
    at = 0
    for part, offset, size in found:
        if part < 0:
            place = _aligned(at, offset)
            file.write(b"\0" * (place - at))
            file.write(new[offset : offset + size].data)
            at = place + size


def _aligned(at: int, like: int) -> int:
    """The first number from ``at`` on that leaves the same remainder as ``like``."""
    return at + (like - at) % ALIGNMENT


def pieces(new: Bytes, bases: Sequence[Bytes]) -> list[Piece]:
    """What ``new`` consists of: ``(number of the base, offset there, size)``, or -1 and the offset in ``new``."""
    indexes = [_Index(base) for base in bases]
    found: list[Piece] = []
    at = own = 0
    while at < len(new):
        hit = _find(new, at, indexes)
        if hit is None:
            at = min(at + WINDOW, len(new))
            continue
        here, part, there = hit
        base = bases[part]
        back = _same(new[own:here][::-1], base[:there][::-1])
        here, there = here - back, there - back
        size = _same(new[here:], base[there:])
        if size < WORTH:
            at = here + back + WORD
            continue
        if here > own:
            found.append((-1, own, here - own))
        found.append((part, there, size))
        at = own = here + size
    if own < len(new):
        found.append((-1, own, len(new) - own))
    return found


class _Index:
    """Words of a part that are there only once, sorted, and where they are."""

    def __init__(self, base: Bytes) -> None:
        self.base = base
        words = base[: len(base) // WORD * WORD].view(np.uint64)[:: STRIDE // WORD]
        unique, first, counts = np.unique(words, return_index=True, return_counts=True)
        once = counts == 1
        self.words = unique[once]
        self.places = first[once].astype(np.int64) * STRIDE

    def candidates(self, mine: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        """(index into ``mine``, offset in the part) of words that are in both."""
        if len(self.words) and len(mine):
            slots = np.minimum(np.searchsorted(self.words, mine), len(self.words) - 1)
            for hit in np.flatnonzero(self.words[slots] == mine):
                yield int(hit), int(self.places[slots[hit]])


def _find(new: Bytes, at: int, indexes: Sequence[_Index]) -> tuple[int, int, int] | None:
    """The first place from ``at`` on, within a window, that a part has too: (in new, the part, in the part)."""
    start = -(-at // WORD) * WORD
    window = new[start : start + WINDOW]
    mine = window[: len(window) // WORD * WORD].view(np.uint64)
    best: tuple[int, int, int] | None = None
    for number, index in enumerate(indexes):
        for hit, there in index.candidates(mine):
            here = start + hit * WORD
            if best is not None and here >= best[0]:
                break
            wanted = min(4096, len(new) - here)
            if _same(new[here : here + wanted], index.base[there : there + wanted]) == wanted:
                best = (here, number, there)
                break
    return best


def _same(one: Bytes, two: Bytes) -> int:
    """How many bytes are the same from the start on."""
    size = min(len(one), len(two))
    step = 4096
    done = 0
    while done < size:
        end = min(done + step, size)
        differ = one[done:end] != two[done:end]
        if differ.any():
            return done + int(differ.argmax())
        done, step = end, min(step * 4, CHUNK)
    return size


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[Bytes]:
    """A file's bytes as an array, without reading it; the pages go with the last array on them."""
    with open(path, "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    yield np.frombuffer(pages, dtype=np.uint8)
