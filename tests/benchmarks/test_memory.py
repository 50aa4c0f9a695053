"""``benchmarks/memory.py``: what it counts, and how it tells of it."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import memory
from benchmarks.memory import Mark, Peak


def test_the_sampler_keeps_the_most() -> None:
    numbers = iter([1, 9, 2, *[3] * 100_000])
    with memory.Sampler(lambda: next(numbers), pause=0.0001) as sampler:
        while sampler.count < 4:
            time.sleep(0.001)
    assert sampler.most == 9
    seen = sampler.count
    time.sleep(0.01)
    assert sampler.count == seen  # it has ended


def test_settled_waits_for_what_goes_on() -> None:
    begin = time.perf_counter()
    found = memory.settled(lambda: int(min(time.perf_counter() - begin, 0.1) * 100))
    assert found == 10


def test_resident_memory() -> None:
    before = memory.resident(os.getpid())
    held = bytearray(os.urandom(1 << 20) * 64)
    assert memory.resident() - before > 32 << 20
    del held
    assert memory.resident(2**31 - 1) == 0


def manifest(**weights: tuple[str, int]) -> Any:
    """Stand-in for a manifest: component -> (digest, bytes) of its weights."""
    return SimpleNamespace(
        components={name: SimpleNamespace(weights=f"weights/{name}") for name in weights},
        files={f"weights/{name}": SimpleNamespace(sha256=sha, size=size) for name, (sha, size) in weights.items()},
    )


def test_shared_weights_count_once() -> None:
    both = [manifest(unet=("a", 5), vae=("b", 2)), manifest(unet=("a", 5), vae=("c", 3))]
    assert memory.weights_by_component(both) == {"unet": {"a": 5}, "vae": {"b": 2, "c": 3}}
    store = SimpleNamespace(bytes=7)
    shared = SimpleNamespace(artifacts=[SimpleNamespace(_weights=store), SimpleNamespace(_weights=store)])
    assert memory.weights_held(shared) == 7
    assert memory.weights_held(SimpleNamespace(artifacts=[SimpleNamespace()])) == 0


def test_tables() -> None:
    marks = [Mark("context", 500_000_000, 0, 0, 0), Mark("unet.cfg loaded", 5_635_000_000, 10, 20, 5_135_000_000)]
    table = memory.render_marks(marks)
    assert "| unet.cfg loaded | 5.13 GB | 5.63 GB | 0 kB | 0 kB | 5.13 GB |" in table
    peak = Peak(["a", "b"], 8_200_000_000, 7_000_000_000, 99)
    assert memory.peak_cells(peak) == ["a and b", "8.20 GB", "7.00 GB", "99"]


@pytest.mark.slow
def test_a_second_resolution_adds_no_weights(
    micro_artifact: Path, micro_wide_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = tmp_path / "memory.json"
    assert memory.main([str(micro_artifact), str(micro_wide_artifact), "--steps", "1", "--json", str(told)]) == 0
    found = json.loads(told.read_text())
    assert found["weights_grown"] == 0
    assert all(len(files) == 1 for files in found["weights"].values())
    one, two = found["engines"]
    names = [mark["name"] for mark in two["marks"]]
    assert "unet.cfg 64x64 first call" in names and "unet.cfg 96x64 first call" in names
    assert "text_encoder.main 96x64 first call" not in names  # shared, so called already
    assert one["marks"][-1]["weights"] == two["marks"][-1]["weights"] > 0
    assert [len(peak["artifacts"]) for peak in found["peaks"]] == [1, 2]
    assert all(peak["driver"] > 0 for peak in found["peaks"])
    assert "The further artifacts added 0 kB of weights" in capsys.readouterr().out
