"""Conformance: every loader's engines refuse what they weren't compiled for. Compiled code would not."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import runtimes
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Check, TensorSpec, Variant
from runtimes.base import Engine, EngineInputError

pytestmark = pytest.mark.slow
ARTIFACTS = {
    "torch": "micro_artifact",
    "onnx": "micro_onnx_artifact",
    "trt": "micro_trt_artifact",
    "stand-in onediff": "micro_standin_onediff_artifact",
}


@pytest.fixture(
    scope="module", params=["torch", "onnx", "stand-in onediff", pytest.param("trt", marks=pytest.mark.gpu)]
)
def engine(request: pytest.FixtureRequest) -> Engine:
    return runtimes.load(request.getfixturevalue(ARTIFACTS[request.param])).artifacts[0].engine("unet", "nocfg")


@pytest.fixture
def inputs(engine: Engine) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.shape, generator=generator).to(engine.device) for s in engine.inputs}


def test_right_inputs_run_and_outputs_are_as_described(engine: Engine, inputs: dict[str, Tensor]) -> None:
    out = engine(**inputs)
    described = [(s.shape, s.dtype, s.stride) for s in engine.outputs]
    assert [(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.stride()) for t in out] == described
    assert torch.isfinite(out[0]).all()


def test_inputs_are_left_as_they_were(engine: Engine, inputs: dict[str, Tensor]) -> None:
    before = {n: t.clone() for n, t in inputs.items()}
    engine(**inputs)
    assert all(torch.equal(before[n], t) for n, t in inputs.items())


def test_the_same_inputs_give_the_same_bits(engine: Engine, inputs: dict[str, Tensor]) -> None:
    assert torch.equal(engine(**inputs)[0].clone(), engine(**inputs)[0])


def test_wrong_shape(engine: Engine, inputs: dict[str, Tensor]) -> None:
    two = torch.cat([inputs["sample"]] * 2)
    with pytest.raises(EngineInputError, match=r"sample has shape \(2, 4, 8, 8\), it was compiled for \(1, 4, 8, 8\)"):
        engine(**{**inputs, "sample": two})


def test_wrong_dtype(engine: Engine, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(EngineInputError, match=r"sample is torch.float64, it was compiled for torch.float32"):
        engine(**{**inputs, "sample": inputs["sample"].double()})


def test_wrong_strides(engine: Engine, inputs: dict[str, Tensor]) -> None:
    last = inputs["sample"].to(memory_format=torch.channels_last)
    with pytest.raises(EngineInputError, match="strides"):
        engine(**{**inputs, "sample": last})


def test_strides_of_axes_of_one_do_not_matter(engine: Engine, inputs: dict[str, Tensor]) -> None:
    odd = inputs["sample"].as_strided((1, 4, 8, 8), (7, 64, 8, 1))
    assert torch.equal(engine(**{**inputs, "sample": odd})[0].clone(), engine(**inputs)[0])


def test_wrong_device(engine: Engine, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(EngineInputError, match=f"sample is on meta, the engine on {engine.device}"):
        engine(**{**inputs, "sample": inputs["sample"].to("meta")})


def test_wrong_names(engine: Engine, inputs: dict[str, Tensor]) -> None:
    with pytest.raises(EngineInputError, match="it was given"):
        engine(**{("latents" if n == "sample" else n): t for n, t in inputs.items()})
    with pytest.raises(EngineInputError, match="takes sample"):
        engine(**{n: t for n, t in inputs.items() if n != "timestep"})


def test_weights_that_the_code_does_not_know_are_refused(micro_artifact: Path) -> None:
    """A manifest of another code's constants (a stand-in manifest on the real package)."""
    from runtimes.torch_package import TorchPackageEngine

    artifact = runtimes.load(micro_artifact).artifacts[0]
    form = artifact.manifest.components["unet"].variants["nocfg"]
    check = Check(status="deferred", error={}, tolerance=1.0, reason="stand-in")
    other = Variant(file=form.file, inputs=form.inputs, outputs=form.outputs, constants={"x": "x"}, check=check)
    with pytest.raises(SdxlError, match="reads other weights than its manifest says"):
        TorchPackageEngine(micro_artifact / form.file, "unet", other, {}, torch.device("cpu"))


class StandInEngine(Engine):
    """An engine that returns its first input."""

    def _run(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return (inputs[0],)


def test_the_base_class_checks_before_the_backend_runs() -> None:
    spec = TensorSpec(name="x", shape=(2,), dtype="float32", stride=(1,))
    check = Check(status="deferred", error={}, tolerance=1.0, reason="stand-in")
    engine = StandInEngine(
        "stand-in", Variant(file="f", inputs=(spec,), outputs=(spec,), constants={}, check=check), torch.device("cpu")
    )
    with pytest.raises(EngineInputError):
        engine(x=torch.zeros(3))
    assert engine.calls == 0
    assert engine(x=torch.ones(2))[0].sum() == 2 and engine.calls == 1
