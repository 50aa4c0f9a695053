"""What is recorded when, and how much memory is asked for: what needs no GPU of ``runtimes.cuda_graph``."""

import contextlib
from typing import Any

import msgspec
import pytest
import torch

from buildtool.store import manifest as manifests
from runtimes import artifact, cuda_graph, gpu_upload, timeline
from runtimes.cuda_graph import GraphedCall, GraphPool
from tests.runtimes.stand_in import stand_in_manifest
from tests.runtimes.test_memory import other

GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def nothing_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphPool, "_wanted", {})


def test_the_most_that_was_wanted_of_a_device_counts() -> None:
    for device, size in ((GPU, 5), (SECOND, 9), (GPU, 7), (GPU, 6)):
        GraphPool.want(device, size)
    assert GraphPool._wanted == {GPU: 7, SECOND: 9}


def test_a_block_that_finds_no_room_is_done_without(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    asked: list[int] = []

    def full(size: int, **_: Any) -> None:
        asked.append(size)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "use_mem_pool", lambda pool: contextlib.nullcontext())
    pool = object.__new__(GraphPool)
    pool.stream, pool.memory, pool._reserved = None, None, 0  # type: ignore[assignment]
    GraphPool.want(GPU, 7_000_000_000)
    with caplog.at_level("INFO"):
        pool.reserve(GPU)
        pool.reserve(GPU)
    assert asked == [7_000_000_000] and "no room for a block of 7.0 GB" in caplog.text


def test_nothing_is_recorded_while_that_is_postponed(monkeypatch: pytest.MonkeyPatch) -> None:
    call = GraphedCall("unet.cfg", lambda inputs: inputs, (), (), GPU)
    done: list[str] = []

    class StandInGraph:
        def replay(self) -> None:
            done.append("replay")

    def record(self: Any, inputs: Any) -> None:
        done.append("record")
        self._graph = StandInGraph()

    def once(self: Any, inputs: Any) -> None:
        done.append("once")
        self._ran = True

    monkeypatch.setattr(GraphedCall, "_once", once)
    monkeypatch.setattr(GraphedCall, "_record", record)
    monkeypatch.setattr(timeline, "_spans", [])
    with cuda_graph.postponed():
        assert not call.settled
        call([])
        assert call.settled
        call([])
    assert not call.settled
    call([])
    with cuda_graph.postponed():
        assert call.settled
        call([])  # a graph that is there is used
    assert done == ["once", "once", "record", "replay", "replay"]
    assert [span.name for span in timeline.spans()] == ["first run unet.cfg", "record unet.cfg"]
    call.forget("its memory has moved")
    assert not call._ran, "TensorRT wants a run before it is recorded again"


@pytest.fixture
def two_sizes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders of stand-in artifacts for a GPU, which stand-ins say is there."""
    there = {}
    for name, width, taken in (("small", 64, (3000, 8000)), ("wide", 96, (4000, 100_000))):
        plain = other(stand_in_manifest(width=width), "sm90", "torch_package")
        unet = plain.components["unet"]
        forms = {
            variant: msgspec.structs.replace(unet.variants["cfg"], activation_bytes=size)
            for variant, size in zip(("cfg", "nocfg"), taken, strict=True)
        }
        there[name] = msgspec.structs.replace(plain, components={"unet": msgspec.structs.replace(unet, variants=forms)})
    monkeypatch.setattr(manifests, "read", lambda path: there[str(path)])
    monkeypatch.setattr(artifact, "device_for", lambda manifest, asked: GPU)
    monkeypatch.setattr(artifact, "Artifact", lambda folder, *_: folder)
    monkeypatch.setattr(gpu_upload, "begin", lambda *_: None)
    return [*there]


def test_the_pool_begins_with_room_for_the_largest_call(two_sizes: list[str]) -> None:
    assert len(artifact.open_all([*two_sizes], None)) == 2
    assert GraphPool._wanted == {GPU: 125_000}
    artifact.open_all([two_sizes[0]], None)
    assert GraphPool._wanted == {GPU: 125_000}


@pytest.mark.parametrize("mode", ["staged", "model-offload"])
def test_what_leaves_the_gpu_between_stages_asks_for_none(two_sizes: list[str], mode: str) -> None:
    artifact.open_all([*two_sizes], None, mode=mode)
    assert not any(GraphPool._wanted.values())


def test_a_cpu_has_no_pool(two_sizes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "device_for", lambda manifest, asked: torch.device("cpu"))
    artifact.open_all([*two_sizes], None)
    assert not GraphPool._wanted
