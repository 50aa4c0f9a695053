"""A UNet whose negative prompt is zeros takes no text for it, and computes the same."""

from pathlib import Path

import pytest
import torch

from buildtool import models
from exporters import layout, sdxl, weights
from exporters.base import Request


@torch.no_grad()
@pytest.mark.parametrize("variant", ["cfg", "nocfg", "cfg_shallow"])
def test_the_graph_that_is_compiled_gives_what_zeros_give(micro_model: Path, variant: str) -> None:
    options = {"no_negative_prompt": True} | ({"deepcache": {"branch": 2}} if "shallow" in variant else {})
    request = Request(64, 64, 2, "fp32", "cpu", "cpu-avx2", options)
    row = sdxl.component("unet", options)
    source = models.resolve(str(micro_model))
    config, tensors = source.configs["unet"], dict(source.tensors("unet"))
    inputs = sdxl.example_inputs(row, source.configs, request, variant)
    assert inputs["encoder_hidden_states"].shape[0] == 2
    assert inputs["sample"].shape[0] == (2 if variant == "nocfg" else 4)

    graph = row.graph(config, "cpu", torch.float32)
    plan = layout.plan(dict(graph.module.named_parameters()), graph.sources, {}, graph.recipes)
    for name, parameter in graph.module.named_parameters():
        stored = plan[name]
        parameter.copy_(weights.physical(name, stored, tensors).as_strided(stored.shape, stored.stride))
    reference = row.reference(config, tensors, "cpu")
    text = inputs["encoder_hidden_states"]
    zeros = torch.zeros(inputs["sample"].shape[0] - 2, *text.shape[1:])
    wanted = reference(**{**inputs, "encoder_hidden_states": torch.cat([zeros, text])})
    for made in (graph.module(**inputs), reference(**inputs)):
        torch.testing.assert_close(made[0], wanted[0], rtol=1e-4, atol=1e-5)
    other = reference(**{**inputs, "encoder_hidden_states": torch.cat([zeros + 1, text])})
    assert variant == "nocfg" or not torch.allclose(other[0], wanted[0], atol=1e-3), "the text matters"
