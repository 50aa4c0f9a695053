"""Where a process's time went, from its start: spans that may overlap, for ``sdxl-run -v`` and ``--json``.

Standard library only: the first spans end before torch is imported.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Span:
    """Seconds since the process began."""

    name: str
    start: float
    end: float


LIMIT = 10_000
"""Spans kept at most, of some 2,000 pictures: a process that serves for days tells of its start."""

_spans: list[Span] = []  # threads append to it


def now() -> float:
    """Seconds since the process began (to a hundredth: the kernel counts its start in ticks)."""
    return time.perf_counter() - _BEGAN


@contextmanager
def span(name: str) -> Iterator[None]:
    """Records what runs inside it, also when it fails."""
    start = now()
    try:
        yield
    finally:
        add(name, start, now())


def add(name: str, start: float, end: float) -> None:
    """Records a span that was timed elsewhere, in seconds of :func:`now`."""
    if len(_spans) < LIMIT:
        _spans.append(Span(name, start, end))


def spans() -> list[Span]:
    """All spans so far, by their start."""
    return sorted(_spans, key=lambda each: (each.start, each.end))


def as_dicts() -> list[dict[str, str | float]]:
    return [{"name": s.name, "start": round(s.start, 4), "end": round(s.end, 4)} for s in spans()]


def render(shown: Sequence[Span], width: int = 40) -> str:
    """Spans as people read them: start, seconds, name, and a bar on the common axis."""
    total = max((s.end for s in shown), default=0.0) or 1.0
    lines = [f"{'start':>8} {'seconds':>8}  what"]
    longest = max((len(s.name) for s in shown), default=0)
    for s in shown:
        first, last = int(s.start / total * width), max(int(s.end / total * width), int(s.start / total * width) + 1)
        bar = " " * first + "#" * (last - first)
        lines.append(f"{s.start:8.3f} {s.end - s.start:8.3f}  {s.name:<{longest}}  |{bar[:width]:<{width}}|")
    return "\n".join(lines)


def _process_began() -> float:
    """``time.perf_counter()`` when this process was started; when this module was imported, where nobody knows."""
    here = time.perf_counter()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return here
    return here - max(age, 0.0)


_BEGAN = _process_began()
