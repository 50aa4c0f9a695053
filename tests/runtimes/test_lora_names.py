"""Where a LoRA's products go in weights that are stored joined."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from buildtool import models
from buildtool.checkpoint.tensors import module_shapes
from buildtool.store.errors import SdxlError
from buildtool.store.manifest import Component, StoredTensor
from exporters import layout, sdxl
from runtimes import lora_names


def test_rows_of_full_size_sdxl() -> None:
    """Text projections of two widths lie in one tensor there, time projections of three in another."""
    config = models.resolve("random:sdxl-base").configs["unet"]
    graph = sdxl.component("unet", {}).graph(config, "meta", torch.float16)
    renamed = layout.pad_small(graph.module)
    planned = layout.plan(dict(graph.module.named_parameters()), graph.sources, renamed)
    tensors = {
        name: StoredTensor(shape=t.shape, dtype=t.dtype, stride=t.stride, sources=t.sources)  # type: ignore[arg-type]
        for name, t in planned.items()
    }
    component = Component(loader="", precision="fp16", code_key="", weights="", tensors=tensors, variants={})
    found = lora_names.stored_rows(component)
    shapes = {name: shape for name, shape in module_shapes("unet", config).items() if len(shape) > 1}
    assert {name: size for name, (_, _, size) in found.items()} == {
        n: (s[0], math.prod(s[1:])) for n, s in shapes.items()
    }
    for name, (stored, start, (rows, _)) in found.items():
        before = tensors[stored].sources[: tensors[stored].sources.index(name)]
        assert start == sum(shapes[source][0] for source in before) and start + rows <= tensors[stored].shape[0]


def test_weights_that_are_rounded_take_no_lora(tmp_path: Path) -> None:
    stored = StoredTensor(
        shape=(4, 4), dtype="float8_e4m3fn", stride=(4, 1), sources=("a", "b"), recipe="product.weight"
    )
    unet = Component(
        loader="torch_package", precision="fp8", code_key="", weights="", tensors={"w": stored}, variants={}
    )
    manifest: Any = SimpleNamespace(components={"unet": unet}, command=("sdxl-build", "torch", "--precision", "fp8"))
    with pytest.raises(SdxlError, match=r"fp8 artifact.*Build it in: sdxl-build torch --precision fp8 --lora FILE"):
        lora_names.places(tmp_path / "any.safetensors", manifest)
