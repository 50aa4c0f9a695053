"""Engine files that were split, put together again while they are read: their bytes lie in several files.

exporters/trt_share.py has the format: what engines of one checkpoint have in common is stored once. Nothing is
assembled on the disk or in memory; the library asks for bytes and gets them from where they are.
"""

import bisect
import json
import mmap
import re
import struct
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError

MAGIC = b"SDXLPCS1"
_DIGEST = re.compile("[0-9a-f]{64}")
CHUNK = 64 << 20
"""Bytes that are handed over at once, at most."""


class Pieces:
    """A split engine, readable from any offset.

    Args:
        engine: its file; the parts lie in the folder ``weights`` beside it.
        component: whose engine it is: parts are named after it.

    Raises:
        SdxlError: a part is missing, or the file is damaged.
    """

    def __init__(self, engine: Path, component: str) -> None:
        self._open: list[Any] = []
        try:
            own = self._map(engine)
            (length,) = struct.unpack("<Q", own[len(MAGIC) : len(MAGIC) + 8])
            begin = len(MAGIC) + 8 + length
            header = json.loads(bytes(own[len(MAGIC) + 8 : begin]))
            if not all(_DIGEST.fullmatch(digest) for digest in header["parts"]):
                raise ValueError("it names no parts")
            names = [f"{component}-{digest[:12]}.part" for digest in header["parts"]]
            parts = [self._map(engine.parent / "weights" / name) for name in names]
            self.size, self.sha256 = int(header["size"]), str(header["sha256"])
            self._starts: list[int] = []
            self._pieces: list[memoryview] = []
            at = 0
            for part, offset, size in header["pieces"]:
                offset = offset if part >= 0 else begin + offset
                piece = (parts[part] if part >= 0 else own)[offset : offset + size]
                if len(piece) != size:
                    raise ValueError("it is cut short")
                self._starts.append(at)
                self._pieces.append(piece)
                at += size
            if at != self.size:
                raise ValueError("pieces are missing")
        except FileNotFoundError as error:
            raise SdxlError(f"{error.filename} is missing.", "Check the artifact: sdxl-build verify") from None
        except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error) as error:
            raise SdxlError(f"{engine} can't be read: {error}.", "Check the artifact: sdxl-build verify") from None

    def _map(self, path: Path) -> memoryview:
        with open(path, "rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._open.append(pages)
        return memoryview(pages)

    def read(self, at: int, size: int) -> bytes:
        """Up to ``size`` bytes from an offset on; fewer at the end, and never more than :data:`CHUNK`."""
        left = max(0, min(size, self.size - at, CHUNK))
        found = []
        number = bisect.bisect_right(self._starts, at) - 1
        while left:
            piece, start = self._pieces[number], at - self._starts[number]
            taken = piece[start : start + left]
            found.append(taken)
            at, left, number = at + len(taken), left - len(taken), number + 1
        return b"".join(found)

    def close(self) -> None:
        """Gives the files back; nothing may be read afterwards."""
        for view in self._pieces:
            view.release()
        self._pieces = []


def is_split(engine: Path) -> bool:
    with open(engine, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def reader(library: Any, pieces: Pieces) -> Any:
    """The library's stream reader on a split engine."""

    class Reader(library.IStreamReaderV2):  # type: ignore[misc]
        def __init__(self) -> None:
            library.IStreamReaderV2.__init__(self)
            self.at = 0

        def read(self, size: int, stream: int) -> bytes:
            data = pieces.read(self.at, size)
            self.at += len(data)
            return data

        def seek(self, offset: int, where: Any) -> bool:
            at = {"SET": offset, "CUR": self.at + offset, "END": pieces.size - abs(offset)}[where.name]
            if not 0 <= at <= pieces.size:
                return False
            self.at = at
            return True

    return Reader()
