"""Where a LoRA's products go in weights that are stored joined."""

import math

import torch

from buildtool import models
from buildtool.checkpoint.tensors import module_shapes
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
    found = lora_names._rows(component)
    shapes = {name: shape for name, shape in module_shapes("unet", config).items() if len(shape) > 1}
    assert {name: size for name, (_, _, size) in found.items()} == {
        n: (s[0], math.prod(s[1:])) for n, s in shapes.items()
    }
    for name, (stored, start, (rows, _)) in found.items():
        before = tensors[stored].sources[: tensors[stored].sources.index(name)]
        assert start == sum(shapes[source][0] for source in before) and start + rows <= tensors[stored].shape[0]
