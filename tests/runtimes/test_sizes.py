"""Artifacts of trt's --dynamic make any size of a range, on one engine (stand-in manifests and library)."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Manifest, TensorSpec, Variant
from runtimes import sizes, trt_engine
from runtimes.artifact import Artifact
from runtimes.jobs import Job
from runtimes.names import Names
from runtimes.pipeline import Pipeline
from runtimes.session import Planner
from runtimes.trt_engine import Device, TrtEngine
from tests.runtimes import test_trt_engine
from tests.runtimes.stand_in import stand_in_manifest
from tests.runtimes.test_trt_engine import CPU, Context, EngineStandIn, Library

free = test_trt_engine.free
RANGE = {"dynamic": {"min": [64, 64], "max": [128, 192]}}


def spec(name: str, *shape: int) -> TensorSpec:
    strides = tuple(int(torch.Size(shape[i + 1 :]).numel()) for i in range(len(shape)))
    return TensorSpec(name=name, shape=shape, dtype="float16", stride=strides)


def ranged(options: dict[str, Any] = RANGE) -> Manifest:
    """Built at 96x128 for 64x64..128x192, in steps of 16."""
    plain = stand_in_manifest(width=96, height=128, options=options)
    unet = plain.components["unet"]
    form = unet.variants["cfg"]
    forms = {
        "unet": ((spec("sample", 2, 4, 16, 12), spec("timestep", 1)), (spec("noise_pred", 2, 4, 16, 12),)),
        "vae_decoder": ((spec("latents", 1, 4, 16, 12),), (spec("sample", 1, 3, 128, 96),)),
        "text_encoder": ((spec("input_ids", 1, 77),), (spec("hidden_states", 1, 77, 8),)),
    }
    components = {
        name: msgspec.structs.replace(
            unet, variants={"cfg": msgspec.structs.replace(form, inputs=inputs, outputs=outputs)}
        )
        for name, (inputs, outputs) in forms.items()
    }
    key = msgspec.structs.replace(plain.key, configs={**plain.key.configs, "unet": {"block_out_channels": [16, 32]}})
    command = (*plain.command, "--dynamic", "64x64..128x192")
    return msgspec.structs.replace(plain, key=key, components=components, command=command)


@pytest.mark.parametrize(
    ("size", "made"),
    [
        ((96, 128), True),
        ((64, 64), True),
        ((128, 192), True),
        ((112, 80), True),
        ((144, 128), False),
        ((96, 48), False),
        ((104, 128), False),
    ],
)
def test_a_range_has_the_sizes_between_its_ends_in_steps(size: sizes.Size, made: bool) -> None:
    assert sizes.makes(ranged(), size) is made
    assert sizes.makes(ranged({}), size) is (size == (96, 128))


def test_an_artifact_of_the_very_size_comes_before_one_whose_range_holds_it() -> None:
    fixed = stand_in_manifest(width=112, height=80)
    assert sizes.find([ranged(), fixed], (112, 80)) == 1
    assert sizes.find([ranged(), fixed], (80, 80)) == 0
    assert sizes.find([ranged(), fixed], (8, 8)) is None
    assert sizes.described([ranged(), fixed]) == "64x64..128x192 in steps of 16, 112x80"


def test_at_another_size_pictures_and_latents_are_larger_and_nothing_else() -> None:
    made = sizes.resized(ranged(), (64, 192))
    assert (made.key.width, made.key.height) == (64, 192)
    unet, decoder = (made.components[name].variants["cfg"] for name in ("unet", "vae_decoder"))
    assert unet.inputs == (spec("sample", 2, 4, 24, 8), spec("timestep", 1))
    assert unet.outputs == (spec("noise_pred", 2, 4, 24, 8),)
    assert (decoder.inputs, decoder.outputs) == ((spec("latents", 1, 4, 24, 8),), (spec("sample", 1, 3, 192, 64),))
    assert made.components["text_encoder"] == ranged().components["text_encoder"]


def planner(tmp_path: Path) -> Planner:
    options = Job(prompt="", seed=1, steps=2, guidance=1.0, guidance_until=1.0, num_images=1)
    return Planner([ranged()], options, Names(str(tmp_path / "{index}.png")))


def test_the_command_line_takes_any_size_of_the_range(tmp_path: Path) -> None:
    def size(**asked: int) -> tuple[int, int]:
        (picture,) = planner(tmp_path).plan([Job(prompt="x", **asked)])
        return picture.parameters.width, picture.parameters.height

    assert size() == (96, 128)
    assert size(width=64, height=192) == (64, 192)
    assert size(width=112) == (112, 128)


@pytest.mark.parametrize("asked", [(256, 128), (104, 128), (96, 16)])
def test_a_size_outside_of_the_range_is_told_with_a_command_that_builds_it(
    asked: tuple[int, int], tmp_path: Path
) -> None:
    width, height = asked
    told = rf"{width}x{height}; .*64x64\.\.128x192 in steps of 16\. Build .*--gpu cpu --resolution {width}x{height}$"
    with pytest.raises(SdxlError, match=told):
        planner(tmp_path).plan([Job(prompt="x", width=width, height=height)])
    pipeline = object.__new__(Pipeline)
    pipeline.artifacts, pipeline._resized = [standing_in()], {}
    with pytest.raises(SdxlError, match=told):
        pipeline._artifact(height, width)


def standing_in() -> Artifact:
    """An opened artifact without its folder."""
    made = object.__new__(Artifact)
    made.folder, made.manifest, made.device, made._engines, made._origin = Path("a"), ranged(), CPU, {}, None
    return made


def test_the_pipeline_opens_another_size_once_and_shares_what_has_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, tuple[int, int]]] = []

    def load(self: Artifact, component: str, variant: str = "main") -> str:
        loaded.append((component, self.size))
        return f"{component} {self.size}"

    monkeypatch.setattr(Artifact, "unchecked_engine", load)
    pipeline = object.__new__(Pipeline)
    pipeline.artifacts, pipeline._resized = [standing_in()], {}
    own, other = pipeline._artifact(128, 96), pipeline._artifact(80, 112)
    assert own is pipeline.artifacts[0] and other is pipeline._artifact(80, 112)
    assert (own.size, other.size) == ((96, 128), (112, 80))
    for artifact in (own, other, other):
        for component in ("text_encoder", "unet"):
            artifact.engine(component, "cfg")
    assert loaded == [("text_encoder", (96, 128)), ("unet", (96, 128)), ("unet", (112, 80))]


def test_a_deferred_check_is_of_the_size_that_the_golden_tensors_have(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[int, int]] = []
    monkeypatch.setattr(Artifact, "unchecked_engine", lambda self, *names: str(self.size))
    monkeypatch.setattr("runtimes.check.ensure", lambda artifact, *rest: checked.append(artifact.size))
    artifact = standing_in()
    unet = artifact.manifest.components["unet"]
    form = unet.variants["cfg"]
    deferred = msgspec.structs.replace(form, check=msgspec.structs.replace(form.check, status="deferred"))
    components = {**artifact.manifest.components, "unet": msgspec.structs.replace(unet, variants={"cfg": deferred})}
    artifact.manifest = msgspec.structs.replace(artifact.manifest, components=components)
    assert artifact.resized((112, 80)).engine("unet", "cfg") == "(112, 80)"
    assert checked == [(96, 128)]


class OpenContext(Context):
    """A stand-in for a context whose shapes are set."""

    shapes: dict[str, tuple[int, ...]]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes = {name: shape}
        return shape[0] <= 4


class OpenEngine(EngineStandIn):
    """A stand-in for an ICudaEngine that leaves its tensors' first size open."""

    def __init__(self, size: int) -> None:
        super().__init__(size, (-1, 3))

    def create_execution_context(self, settings: Any) -> Context:
        self.contexts.append(OpenContext(self, settings))
        return self.contexts[-1]


class OpenLibrary(Library):
    class Runtime(Library.Runtime):
        opened = 0

        def deserialize_cuda_engine(self, pages: Any) -> EngineStandIn:
            self.opened += 1
            return OpenEngine(int(bytes(memoryview(pages))))


def test_sizes_of_one_engine_share_its_weights_and_have_contexts_of_their_own(free: list[int], tmp_path: Path) -> None:
    where = Device.of(OpenLibrary(), "TensorRT-RTX", CPU)
    path = tmp_path / "unet.cfg.engine"
    path.write_text("64")

    def at(rows: int) -> TrtEngine:
        x, y = (spec(name, rows, 3) for name in "xy")
        form: Variant = msgspec.structs.replace(test_trt_engine.VARIANT, inputs=(x,), outputs=(y,))
        return TrtEngine(path, "unet.cfg", form, where)

    small, large = at(2), at(4)
    assert where.runtime.opened == 1 and small._engine is large._engine
    assert small._context is not large._context
    assert (small._context.shapes, large._context.shapes) == ({"x": (2, 3)}, {"x": (4, 3)})
    x = torch.ones(2, 3, dtype=torch.float16)
    assert torch.equal(small(x=x)[0], x + 1)
    with pytest.raises(SdxlError, match=r"can't make unet\.cfg for x of \(5, 3\)"):
        at(5)


def test_an_engine_whose_sizes_are_fixed_is_compared_exactly() -> None:
    assert trt_engine._fits(((-1, 3), "float16"), ((5, 3), "float16"))
    assert not trt_engine._fits(((2, 3), "float16"), ((5, 3), "float16"))
    assert not trt_engine._fits(((-1, 3), "float16"), ((5, 3), "float32"))
    assert not trt_engine._fits(None, ((5, 3), "float16"))
