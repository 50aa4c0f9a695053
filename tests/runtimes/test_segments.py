"""UNets in segments: each finds its weights in its turn, and pictures are those of the UNet in one piece."""

import itertools
import json
import struct
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import runtimes
from buildtool import models
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Check, Segment, StoredTensor, TensorSpec, Variant
from runtimes import memory, segments
from runtimes.base import Engine, Loader
from runtimes.pipeline import Pipeline
from runtimes.segments import SegmentedEngine, Span, Turns
from runtimes.weights import Weights
from tests import lora_files
from tests.runtimes.test_parity import difference

CPU = torch.device("cpu")


class Recorded:
    """Copies that nobody makes before somebody waits for them, as late as a GPU may make them."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}
        self.busy = [False, False]

    def start(self, side: int, to: Tensor, data: Tensor) -> None:
        assert side not in self.waiting and not self.busy[side]
        self.said.append(f"copy {int(data[0])}")
        self.waiting[side] = (to, data)

    def await_(self, side: int) -> None:
        if side in self.waiting:
            to, data = self.waiting.pop(side)
            to.copy_(data)
        self.busy[side] = True

    def used(self, side: int) -> None:
        self.busy[side] = False


def turns(sizes: list[int]) -> tuple[Turns, Recorded]:
    """Segments of these sizes whose bytes are their numbers, and what is done about them."""
    host = torch.cat([torch.full((size,), i, dtype=torch.uint8) for i, size in enumerate(sizes)])
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    made = Turns(host, [Span(end - size, end) for size, end in zip(sizes, ends, strict=True)], CPU)
    made._copies = recorded = Recorded()
    return made, recorded


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_each_segment_finds_its_weights_and_the_next_ones_are_on_their_way(count: int) -> None:
    sizes = [4, 7, 5, 6, 3][:count]
    ours, recorded = turns(sizes)
    assert ours.bytes == 2 * max(sizes)
    for _ in range(3):
        for number in range(count):
            with ours.turn(number):
                assert ours.buffer(number).tolist() == [number] * sizes[number]
                recorded.said.append(f"run {number}")
    said = recorded.said
    if count == 2:  # both are there for good
        assert said == ["copy 0", "copy 1", *["run 0", "run 1"] * 3]
        return
    for number in range(1, count):  # the next one's copy is started first
        assert said.index(f"copy {number}") < said.index(f"run {number - 1}")
    wanted = {f"copy {number}": 3 for number in range(count)}
    wanted["copy 0"] += count % 2 == 0  # on its way for a step that doesn't come
    if count == 3:
        wanted["copy 1"] = 1  # alone in its buffer
    assert {line: said.count(line) for line in said if "copy" in line} == wanted


def test_a_segment_that_fails_gives_its_buffer_back() -> None:
    ours, recorded = turns([2, 2, 2])
    with pytest.raises(ValueError), ours.turn(0):
        raise ValueError
    assert recorded.busy == [False, False]
    with ours.turn(2):
        assert ours.buffer(2).tolist() == [2, 2]


@pytest.mark.parametrize("change", [{"renamed": "segment2.b"}, {"length": 200}])
def test_weights_that_lack_a_segments_tensors_are_told(change: dict[str, Any], tmp_path: Path) -> None:
    """A stand-in manifest of two segments with a tensor each, and a file that isn't what it describes."""
    stored = [StoredTensor(shape=(4,), dtype="float32", stride=(1,), sources=("a",)) for _ in range(2)]
    check = Check(status="passed", error={}, tolerance=1.0, reason="")
    names = ("segment1.a", "segment2.a")
    parts = tuple(Segment(file="x", inputs=(), outputs=(), constants={name: name}) for name in names)
    form = Variant(file="", inputs=(), outputs=(), constants={}, check=check, segments=parts)
    tensors = dict(zip(names, stored, strict=True))
    described = SimpleNamespace(weights="w", tensors=tensors, variants={"cfg": form})
    manifest: Any = SimpleNamespace(components={"unet": described}, files={"w": SimpleNamespace(sha256="0")})

    def write(renamed: str = "segment2.a", length: int = 512) -> None:
        entries = {
            name: {"dtype": "F32", "shape": [64], "data_offsets": [256 * i, 256 * i + 256]}
            for i, name in enumerate(["segment1.a", renamed])
        }
        header = json.dumps(entries).encode()
        (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * length)

    write()
    turns, views = Weights(CPU, offload=True, sequential=True).turns(tmp_path, manifest, "unet")
    assert [span.size for span in turns._spans] == [256, 256] and views.keys() == tensors.keys()
    write(**change)
    with pytest.raises(SdxlError, match="lacks tensors of a segment"):
        Weights(CPU, offload=True, sequential=True).turns(tmp_path, manifest, "unet")


class Adder(Engine):
    """Adds its inputs up; its outputs are the sum, and twice the sum."""

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        made = torch.stack(inputs).sum(dim=0)
        return (made, 2 * made)[: len(self.outputs)]


def specs(*names: str) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, shape=(1,), dtype="float32", stride=(1,)) for name in names)


def test_parts_hand_over_by_name_and_let_go_after_the_last_reader() -> None:
    named = [(("x", "y"), ("a", "b")), (("a", "x"), ("c",)), (("c", "b"), ("out",))]
    parts = tuple(
        Segment(file=str(i), inputs=specs(*t), outputs=specs(*g), constants={}) for i, (t, g) in enumerate(named)
    )
    check = Check(status="passed", error={}, tolerance=1.0, reason="")
    whole = Variant(file="", inputs=specs("x", "y"), outputs=specs("out"), constants={}, check=check, segments=parts)
    assert whole.files == ("0", "1", "2")
    seen: list[weakref.ref[Tensor]] = []
    alive: list[list[bool]] = []

    class Watched(Adder):
        def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
            alive.append([ref() is not None for ref in seen])
            made = super()._run(inputs)
            seen.extend(weakref.ref(tensor) for tensor in made)
            return made

    engines = [Watched(form.file, form, CPU) for form in segments.forms(whole)]
    ours = SegmentedEngine("unet.cfg", whole, CPU, engines, None)
    (out,) = ours(x=torch.tensor([1.0]), y=torch.tensor([2.0]))
    assert out.item() == (3 + 1) + 6  # c = a + x = 4, b = 6
    assert alive == [[], [True, True], [False, True, True]]  # of a, b and c
    with pytest.raises(ValueError, match=r"unet\.cfg takes x, y"):
        ours(x=torch.zeros(1))


def in_parts(*names: str) -> Variant:
    """A variant whose parts hand one tensor on."""
    check = Check(status="passed", error={}, tolerance=1.0, reason="")
    parts = tuple(
        Segment(file=a, inputs=specs(a), outputs=specs(b), constants={}) for a, b in itertools.pairwise(names)
    )
    return Variant(file="", inputs=specs(names[0]), outputs=specs(names[-1]), constants={}, check=check, segments=parts)


class StandInLoader(Loader):
    """Remembers with which options engines are made."""

    name = "stand-in"

    def __init__(self) -> None:
        self.options: list[Mapping[str, Any]] = []

    def check_machine(self, *_: Any) -> None: ...

    def _engine(self, *arguments: Any) -> Engine:
        _, name, _, form, _, options, device = arguments
        self.options.append(dict(options))
        return Adder(name, form, device)


@pytest.mark.parametrize(
    ("device", "offload", "whole"), [("cuda:0", False, True), ("cuda:0", True, False), ("cpu", False, False)]
)
def test_segments_that_stay_in_memory_are_one_graph(device: str, offload: bool, whole: bool) -> None:
    form, loader, where = in_parts("x", "y", "z"), StandInLoader(), torch.device(device)
    manifest: Any = SimpleNamespace(
        components={"unet": SimpleNamespace(variants={"cfg": form})},
        key=SimpleNamespace(options={"segments": 2}),
    )
    made = loader.engine(Path("a"), manifest, "unet", "cfg", where, Weights(where, offload=offload))
    assert isinstance(made, SegmentedEngine) and [part.name for part in made.parts] == ["unet.cfg.1", "unet.cfg.2"]
    assert loader.options == [{"segments": 2, "cuda_graphs": False}] * 2, "not one each"
    assert (made._graph is not None) == whole


def test_segments_in_turns_are_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    form, loader, where = in_parts("x", "y", "z"), StandInLoader(), torch.device("cuda:0")
    weights = Weights(where, offload=True, sequential=True)
    monkeypatch.setattr(weights, "turns", lambda *_: (turns([1, 1])[0], {}))
    manifest: Any = SimpleNamespace(
        components={"unet": SimpleNamespace(variants={"cfg": form})}, key=SimpleNamespace(options={})
    )
    made = loader.engine(Path("a"), manifest, "unet", "cfg", where, weights)
    assert isinstance(made, SegmentedEngine) and made._graph is None and made._turns is not None
    assert [options["cuda_graphs"] for options in loader.options] == [False, False]


def test_the_graph_of_segments_computes_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a CUDA graph, which calls what it would record."""
    form = in_parts("x", "y", "z")
    engines = [Adder(part.file, part, CPU) for part in segments.forms(form)]
    recorded: list[Any] = []

    class StandInGraph:
        def __init__(self, name: str, function: Any, inputs: Any, outputs: Any, device: torch.device) -> None:
            self.function = function
            recorded.extend((name, inputs, outputs, device))

        def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
            return tuple(2 * made for made in self.function(inputs))

    monkeypatch.setattr(segments, "GraphedCall", StandInGraph)
    ours = SegmentedEngine("unet.cfg", form, CPU, engines, None, graph=True)
    assert recorded == ["unet.cfg", form.inputs, form.outputs, CPU]
    assert ours(x=torch.tensor([3.0]))[0].item() == 6


# From here on with engines.


@pytest.fixture(scope="module")
def segmented(build_guided: Callable[..., Path], micro_model: Path, micro_artifact: Path) -> Path:
    """The micro model in three segments."""
    return build_guided(micro_model, segments=3)


def latents(pipeline: Pipeline) -> Tensor:
    made: Tensor = pipeline(
        ["a", "b"],
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(i) for i in (1, 2)],
        output_type="latent",
    ).images
    return made


@pytest.mark.slow
def test_segments_draw_what_the_whole_unet_draws(segmented: Path, micro_artifact: Path) -> None:
    ours, whole = runtimes.load(segmented), runtimes.load(micro_artifact)
    assert difference(latents(ours), latents(whole)) <= 1e-4
    unet, plain = (p.artifacts[0].manifest.components["unet"] for p in (ours, whole))
    assert [len(form.segments) for form in unet.variants.values()] == [3]
    assert unet.variants["cfg"].check.status == "passed"  # all of it against fp32 eager
    given, wanted = ({spec.name: spec for spec in each.variants["cfg"].inputs} for each in (unet, plain))
    assert given == wanted


@pytest.mark.slow
def test_a_lora_goes_into_every_segment(
    segmented: Path, micro_artifact: Path, micro_model: Path, tmp_path: Path
) -> None:
    tensors = {"unet": dict(models.resolve(str(micro_model)).tensors("unet"))}
    file = lora_files.write(tmp_path / "all.safetensors", lora_files.random_pairs(tensors, seed=1), "kohya")
    ours, whole = runtimes.load(segmented), runtimes.load(micro_artifact)
    plain = latents(ours)
    for pipeline in (ours, whole):
        pipeline.load_lora_weights(str(file))
    assert difference(latents(ours), latents(whole)) <= 1e-3
    assert difference(latents(ours), plain) > 1e-2
    ours.unload_lora_weights()
    assert torch.equal(latents(ours), plain)


@pytest.mark.slow
def test_segments_in_turns_draw_the_same(segmented: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands in for a GPU. Latents are the resident ones, bit by bit, though copies are made at the last
    moment."""
    monkeypatch.setattr(memory, "check", lambda mode, found: None)
    resident, ours = runtimes.load(segmented), runtimes.load(segmented, memory="sequential")
    wanted, there = latents(resident), ours.artifacts[0]
    copies = Recorded()
    init, turn = Turns.__init__, Turns.turn
    ran: list[int] = []

    def watched(self: Turns, *arguments: Any) -> None:
        init(self, *arguments)
        self._copies = copies

    def counted(self: Turns, number: int) -> Any:
        ran.append(number)
        return turn(self, number)

    monkeypatch.setattr(Turns, "__init__", watched)
    monkeypatch.setattr(Turns, "turn", counted)
    assert torch.equal(latents(ours), wanted)
    assert ran == [0, 1, 2] * 6  # three steps of two pictures
    (held,) = there._weights._turns.values()
    largest = max(span.size for span in held._spans)
    file = there.manifest.files[there.manifest.components["unet"].weights]
    assert there._weights.bytes == held.bytes == 2 * largest < file.size and not there._weights._files
    freed = weakref.ref(held.buffers[0])
    del held
    ours.decode(wanted)
    assert freed() is None and not there._weights._turns
    assert torch.equal(latents(ours), wanted)
