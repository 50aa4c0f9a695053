"""``sdxl-build trt --dynamic``: one engine for a range of sizes, built by TensorRT-RTX with no GPU."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from buildtool import models, plan
from buildtool.plan import Plan, Spec
from buildtool.store.errors import SdxlError
from exporters import dynamic, sdxl, trt_engine, weights
from exporters.base import ExportError, Request, TensorSpec
from tests.test_errors import NEEDS_RTX

RANGE = {"min": [64, 64], "max": [128, 160]}
OPTIONS = {"flavor": "rtx", "tf32": True, "compatibility": "none", "golden": True, "dynamic": RANGE}
REQUEST = Request(96, 96, 1, "fp16", "cpu", "sm86", OPTIONS)


def test_a_range_is_two_sizes() -> None:
    assert dynamic.parse("512x768..1024x1024", 32) == {"min": [512, 768], "max": [1024, 1024]}
    assert dynamic.step(8, {"block_out_channels": (320, 640, 1280)}) == 32
    sample = TensorSpec("sample", (2, 4, 128, 96), "float16", (49152, 12288, 96, 1))
    sizes = {"min": [512, 768], "max": [1024, 1280]}
    assert dynamic.shapes(sample, sizes, 768, 1024) == ((2, 4, 96, 64), (2, 4, 128, 96), (2, 4, 160, 128))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("512x512", r"'512x512' is no range of sizes; write MINxMIN\.\.MAXxMAX.*For example: --dynamic 768x768"),
        ("512x512..1024", "is no range of sizes"),
        ("512..1024", "is no range of sizes"),
        ("a", "is no range of sizes"),
        ("500x512..1024x1024", r"multiple of 32, and 64 at least\. Try --dynamic 512x512\.\.1024x1024"),
        ("32x512..1024x1024", r"multiple of 32, and 64 at least\. Try --dynamic 64x512\.\.1024x1024"),
        ("1024x512..512x1024", r"1024x512 is not smaller than 512x1024\. Write the smaller size first"),
        ("512x512..512x512", r"512x512 is not smaller than 512x512\. For one size: --resolution 512x512"),
    ],
)
def test_what_is_no_range_is_told(text: str, told: str) -> None:
    with pytest.raises(ExportError, match=told):
        dynamic.parse(text, 32)


@NEEDS_RTX
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dynamic": "64x64"}, "'64x64' is no range"),
        ({"dynamic": "260x256..512x512"}, "has to be a multiple of 32"),
        ({"resolutions": ((576, 512),)}, r"576x512 can't be: it has to lie in the range\. Try --resolution 512x512"),
        ({"resolutions": ((264, 256),)}, "264x256 can't be: it has to be of multiples of 32"),
        ({"freeu": "0.9,0.2,1.3,1.4"}, "--freeu filters a picture of one size; --dynamic asks for a range"),
        ({"backend": "torch", "gpu": "cpu"}, r"The torch backend compiles for one size, .*repeat --resolution.*trt"),
        ({"backend": "onnx", "gpu": "cpu"}, "The onnx backend compiles for one size"),
    ],
)
def test_what_cannot_be_built_is_told_before_any_work(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SdxlError, match=told):
        planned(**changes)


@NEEDS_RTX
def test_the_range_is_in_the_keys_of_what_has_a_size_and_in_the_command() -> None:
    plain, ranged, wider = planned(dynamic=None), planned(), planned(dynamic="256x256..576x512")
    assert ranged.key.options["dynamic"] == {"min": [256, 256], "max": [512, 512]}
    assert "dynamic" not in plain.key.options
    assert len({made.key.digest for made in (plain, ranged, wider)}) == 3
    for one, other in ((plain, ranged), (ranged, wider)):
        changed = {name for name in plan.COMPONENTS if one.code_keys[name].digest != other.code_keys[name].digest}
        assert changed == {"unet", "vae_decoder"}
    from buildtool.cli import trt_command

    params = trt_command.make_context("trt", list(ranged.command[2:])).params
    (again,) = plan.plan(
        Spec(backend="trt", **{k: v for k, v in params.items() if k not in ("dry_run", "as_json", "preset")})
    )
    assert again.key == ranged.key


def planned(**changes: Any) -> Plan:
    settings = {"backend": "trt", "model": "tiny", "gpu": "sm86", "dynamic": "256x256..512x512", **changes}
    (made,) = plan.plan(Spec(**settings))
    return made


def prepared(name: str, model: Path, folder: Path) -> tuple[Any, Any, Request]:
    """What the builder prepares for the exporter."""
    row, source = sdxl.component(name), models.resolve(str(model))
    file = folder / weights.location(name)
    file.parent.mkdir()
    weights.write(file, trt_engine.TrtExporter().layout(row, source.configs, REQUEST), source.tensors(row.source))
    return row, source, dataclasses.replace(REQUEST, weights=str(file))


@pytest.mark.slow
@torch.no_grad()
def test_the_graph_of_a_range_gives_eagers_numbers_at_any_of_its_sizes(micro_model: Path, tmp_path: Path) -> None:
    """The graph that TensorRT is given, run by ONNX Runtime: the smallest, a middle and the largest size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    row, source, request = prepared("unet", micro_model, tmp_path)
    drawn = trt_engine.graph(row, "nocfg", source.configs, request, "unet.nocfg")
    assert [spec.shape for spec in drawn.outputs] == [(1, 4, 12, 12)]
    session = onnxruntime.InferenceSession(drawn.file, providers=["CPUExecutionProvider"])
    (sample,) = (i for i in session.get_inputs() if i.name == "sample")
    assert sample.shape[:2] == [1, 4] and all(isinstance(size, str) for size in sample.shape[2:])
    reference = row.reference(source.configs["unet"], source.tensors("unet"), "cpu")
    for width, height in ((64, 64), (112, 80), (128, 160)):
        here = dataclasses.replace(request, width=width, height=height)
        inputs = sdxl.example_inputs(row, source.configs, here, "nocfg")
        (made,) = session.run(None, {n: t.numpy() for n, t in inputs.items()})
        (wanted,) = reference(**{n: t.float() for n, t in inputs.items()})
        assert made.shape == (1, 4, height // 8, width // 8)
        assert float((torch.from_numpy(made).float() - wanted).norm() / wanted.norm()) < row.tolerance["fp16"]


@pytest.mark.slow
@NEEDS_RTX
def test_an_engine_for_a_range_is_built_and_described_at_the_resolution(micro_model: Path, tmp_path: Path) -> None:
    row, source, request = prepared("vae_decoder", micro_model, tmp_path)
    code = trt_engine.TrtExporter().export(row, "main", source.configs, request, tmp_path)
    assert [spec.shape for spec in (*code.inputs, *code.outputs)] == [(1, 4, 12, 12), (1, 3, 96, 96)]
    assert (tmp_path / code.file).stat().st_size > 10_000
    assert "Engine generation completed" in (tmp_path / "vae_decoder.log").read_text()


def test_sizes_that_a_network_leaves_open_fit_the_component() -> None:
    declared = TensorSpec("sample", (1, 4, 12, 12), "float16", (576, 144, 12, 1))

    def fits(shape: tuple[int, ...], dtype: str = "float16") -> bool:
        return trt_engine._fits(TensorSpec("sample", shape, dtype, (0,) * len(shape)), declared)

    assert fits((1, 4, -1, -1)) and fits((1, 4, 12, -1))
    assert not fits((2, 4, -1, -1)) and not fits((1, 4, -1)) and not fits((1, 4, -1, -1), "float32")
    assert not fits((1, 4, 12, 12))  # its strides are compared where nothing is open
