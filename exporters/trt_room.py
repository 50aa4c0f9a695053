"""The memory that TensorRT's builder takes, and what this machine has left. Standard library only."""

from collections.abc import Mapping
from pathlib import Path

from exporters.base import ExportError

GB = 1_000_000_000
PROCESS_BYTES = 1_000_000_000
"""A process with torch, the exporter and the builder's library, before any weights."""
PER_WEIGHT = 2.3
"""Bytes of memory for each byte of a variant's weights: measured on the full UNet (docs/tensorrt.md)."""


def build_bytes(parameters: int, width: int) -> int:
    """Memory of one compiler at its peak.

    Args:
        parameters: how many numbers the weights are.
        width: bytes of each.
    """
    return int(parameters * width * PER_WEIGHT) + PROCESS_BYTES


def at_once(needed: Mapping[str, int], free: int, title: str) -> int:
    """How many of the largest compilers fit into free memory.

    Args:
        needed: component's source -> memory of its compiler.
        free: bytes; 0 if nobody knows, then one.

    Raises:
        ExportError: not even one fits.
    """
    name, most = max(needed.items(), key=lambda item: item[1])
    if free and most > free:
        raise ExportError(
            f"{title} takes about {most / GB:.1f} GB of memory to build {name}; {free / GB:.1f} GB are free here.",
            "Free some, or build on a machine with more; --model tiny builds anywhere.",
        )
    return max(1, free // most)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that a new process may take: the machine's, or its container's where that is less; 0 if unknown.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    found = [_meminfo(root / "proc/meminfo")]
    places = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, used in places:
        most, now = (_number(root / "sys/fs/cgroup" / name) for name in (limit, used))
        if most and now:
            # Cached files count as used there, though they are given up for a process that asks.
            found.append(most - now + _cached(root / "sys/fs/cgroup" / limit))
    return max(0, min((n for n in found if n), default=0))


def _meminfo(path: Path) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _cached(limit: Path) -> int:
    try:
        for line in (limit.parent / "memory.stat").read_text().splitlines():
            if line.startswith(("inactive_file ", "total_inactive_file ")):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0
