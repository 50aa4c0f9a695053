"""Engines on the GPU: replayed graphs give what was asked for, and share memory without harm."""

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import runtimes
from buildtool.store.errors import SdxlError
from runtimes import check
from runtimes.base import EngineInputError
from tests.gpu.conftest import PRECISIONS
from tests.gpu.helpers import DEVICE, all_engines, held_weights, outputs, random_inputs, same, stored

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def artifact(artifacts: dict[str, Path]) -> Any:
    return runtimes.load(artifacts["fp16"]).artifacts[0]


@pytest.fixture(scope="module", params=PRECISIONS)
def each(artifacts: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    """The artifact in every precision."""
    return runtimes.load(artifacts[request.param]).artifacts[0]


def test_the_same_inputs_give_the_same_bits(each: Any) -> None:
    for engine in all_engines(each):
        inputs = random_inputs(engine)
        first = outputs(engine, inputs)  # this one may be the recording
        assert all(same(first, outputs(engine, inputs)) for _ in range(3)), engine.name


def test_a_replay_sees_its_inputs(each: Any) -> None:
    """Golden tensors once other inputs have gone through: nothing of the recording is left in an answer."""
    for name, component in each.manifest.components.items():
        for variant, form in component.variants.items():
            engine = each.engine(name, variant)
            engine(**random_inputs(engine, 1))
            engine(**random_inputs(engine, 2))
            error = check.errors(each, name, variant, engine)
            assert max(error.values()) <= form.check.tolerance, engine.name


def test_outputs_survive_calls_of_the_others(each: Any) -> None:
    """Graphs share the memory of their intermediate tensors; outputs must not lie there."""
    engines = all_engines(each)
    inputs = {engine.name: random_inputs(engine) for engine in engines}
    for engine in engines:  # all are recorded
        engine(**inputs[engine.name])
    for engine in engines:
        made = engine(**inputs[engine.name])
        kept = [out.clone() for out in made]
        for other in engines:
            if other is not engine:
                other(**inputs[other.name])
        assert same(kept, [*made]), f"{engine.name}: another engine wrote into its outputs"
        assert same(kept, outputs(engine, inputs[engine.name])), engine.name


def test_inputs_are_left_as_they_were(artifact: Any) -> None:
    for engine in all_engines(artifact):
        inputs = random_inputs(engine)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        engine(**inputs)
        assert all(torch.equal(before[name], tensor) for name, tensor in inputs.items()), engine.name


def test_outputs_are_as_described(artifact: Any) -> None:
    for engine in all_engines(artifact):
        made = engine(**random_inputs(engine))
        described = [(spec.shape, spec.dtype, spec.stride) for spec in engine.outputs]
        assert [(tuple(t.shape), str(t.dtype).removeprefix("torch."), t.stride()) for t in made] == described
        assert all(t.device == DEVICE for t in made)


def test_a_tensor_on_the_cpu_is_refused(artifact: Any) -> None:
    engine = artifact.engine("unet", "cfg")
    inputs = random_inputs(engine)
    with pytest.raises(EngineInputError, match="sample is on cpu, the engine on cuda:0"):
        engine(**{**inputs, "sample": inputs["sample"].cpu()})


def test_calls_on_another_stream(artifact: Any) -> None:
    engine = artifact.engine("unet", "cfg")
    inputs = random_inputs(engine)
    expected = outputs(engine, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made = outputs(engine, inputs)
    stream.synchronize()
    assert same(expected, made)


def test_calls_from_another_thread(artifact: Any) -> None:
    engine = artifact.engine("unet", "nocfg")
    inputs = random_inputs(engine)
    expected, made = outputs(engine, inputs), []
    thread = threading.Thread(target=lambda: made.append(outputs(engine, inputs)))
    thread.start()
    thread.join()
    assert made and same(expected, made[0])


def test_calls_take_no_memory(artifact: Any) -> None:
    engines = all_engines(artifact)
    inputs = [random_inputs(engine) for engine in engines]
    for engine, given in zip(engines, inputs, strict=True):
        engine(**given)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        for engine, given in zip(engines, inputs, strict=True):
            engine(**given)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_a_second_resolution_adds_no_weights(artifacts: dict[str, Path]) -> None:
    counted = []
    for folders in ([artifacts["fp16"]], [artifacts["fp16"], artifacts["wide"]]):
        pipeline = runtimes.load([*folders])
        for one in pipeline.artifacts:
            for engine in all_engines(one):
                engine(**random_inputs(engine))
        counted.append(held_weights(pipeline))
    files = {c.weights for c in pipeline.artifacts[0].manifest.components.values()}
    sizes = [pipeline.artifacts[0].manifest.files[name].size for name in files]
    assert 0 < counted[0] == counted[1] <= sum(sizes)
    first, second = (stored(one, "unet") for one in pipeline.artifacts)
    assert {n: t.data_ptr() for n, t in first.items()} == {n: t.data_ptr() for n, t in second.items()}
    one, two = pipeline.artifacts
    assert one.engine("text_encoder") is two.engine("text_encoder")


def test_weights_changed_in_place_are_seen_by_cfg_and_nocfg_and_every_resolution(artifacts: dict[str, Path]) -> None:
    pipeline = runtimes.load([artifacts["fp16"], artifacts["wide"]])
    engines = [one.engine("unet", variant) for one in pipeline.artifacts for variant in ("cfg", "nocfg")]
    inputs = [random_inputs(engine) for engine in engines]
    before = [outputs(engine, given) for engine, given in zip(engines, inputs, strict=True)]
    artifact = pipeline.artifacts[0]
    plan = artifact.manifest.components["unet"].tensors
    name = next(n for n, tensor in plan.items() if "conv_out.weight" in tensor.sources)
    tensor = stored(artifact, "unet")[name]
    kept = tensor.clone()
    tensor.mul_(2)
    for engine, given, old in zip(engines, inputs, before, strict=True):
        assert not same(old, outputs(engine, given)), f"{engine.name} does not see the change"
    tensor.copy_(kept)
    for engine, given, old in zip(engines, inputs, before, strict=True):
        assert same(old, outputs(engine, given)), engine.name


def test_weights_that_move_are_recorded_anew(artifacts: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    artifact = runtimes.load(artifacts["fp16"]).artifacts[0]
    moved, other = artifact.engine("unet", "nocfg"), artifact.engine("unet", "cfg")
    inputs, others = random_inputs(moved), random_inputs(other)
    before, untouched = outputs(moved, inputs), outputs(other, others)
    copies = {name: tensor.clone() for name, tensor in stored(artifact, "unet").items()}
    with caplog.at_level(logging.INFO, "runtimes"):
        moved.attach(copies)
    assert "unet.nocfg" in caplog.text and "recorded again" in caplog.text
    assert same(before, outputs(moved, inputs))
    for tensor in copies.values():
        tensor.zero_()
    assert not same(before, outputs(moved, inputs))
    assert same(untouched, outputs(other, others))


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_of_the_process_changes_nothing_and_is_left_alone(artifacts: dict[str, Path], allowed: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        artifact = runtimes.load(artifacts["fp32"]).artifacts[0]
        for name, component in artifact.manifest.components.items():
            for variant, form in component.variants.items():
                error = check.errors(artifact, name, variant, artifact.engine(name, variant))
                assert max(error.values()) <= form.check.tolerance, (name, variant)
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (allowed, allowed)
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.mark.parametrize("device", ["cuda:99", "cpu"])
def test_another_device_is_refused(artifacts: dict[str, Path], device: str) -> None:
    with pytest.raises(SdxlError) as caught:
        runtimes.load(artifacts["fp16"], device=device)
    assert "\n" not in str(caught.value)
