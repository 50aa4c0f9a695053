"""A UNet cut at each of its skip connections."""

from pathlib import Path
from typing import Any

import pytest
import torch

from buildtool import models
from exporters import deepcache, sdxl
from exporters.base import Request


def request(branch: int, **changes: Any) -> Request:
    options = {"deepcache": {"interval": 2, "branch": branch}, **changes.pop("options", {})}
    sides = {"width": 64, "height": 64, **changes}
    return Request(batch=1, precision="fp32", device="cpu", target="cpu", options=options, **sides)


@pytest.mark.parametrize("branch", [0, 2, 3, 4, 8])
@torch.no_grad()
def test_the_layers_above_make_the_same_noise_of_the_feature(branch: int) -> None:
    """Sizes that don't halve evenly too: 200 pixels are 25 latents, then 13, then 7."""
    source, asked = models.resolve("tiny"), request(branch, height=200)
    row = sdxl.component("unet", asked.options)
    model = row.reference(source.configs["unet"], source.tensors("unet"), "cpu")
    inputs = sdxl.example_inputs(row, source.configs, asked, "cfg")
    (wanted,) = sdxl.component("unet").reference(source.configs["unet"], source.tensors("unet"), "cpu")(**inputs)
    noise, feature = model(**inputs)
    torch.testing.assert_close(noise, wanted, rtol=1e-5, atol=1e-5)
    (again,) = model(**inputs, feature=feature)
    torch.testing.assert_close(again, wanted, rtol=1e-5, atol=1e-5)
    (shape,) = [s.shape for s in row.inputs(source.configs, asked, "cfg_shallow", torch.float32) if s.name == "feature"]
    assert tuple(feature.shape) == shape
    # What lies below the feature isn't asked, and what lies above is.
    later = sdxl.example_inputs(row, source.configs, asked, "cfg", seed=1)
    assert not torch.allclose(model(**later, feature=feature)[0], model(**later)[0], atol=1e-3)
    assert not torch.allclose(model(**later, feature=feature)[0], again, atol=1e-3)


def test_a_shallow_graph_reads_few_weights(micro_model: Path) -> None:
    source, asked = models.resolve(str(micro_model)), request(0)
    row = sdxl.component("unet", asked.options)
    graph = row.graph(source.configs["unet"], "meta", torch.float32)
    inputs = sdxl.example_inputs(row, source.configs, asked, "nocfg_shallow")
    program = torch.export.export(graph.module, (), kwargs={n: t.to("meta") for n, t in inputs.items()}, strict=False)
    read = {node.name for node in program.graph.nodes if node.users}
    names = {name for node, name in program.graph_signature.inputs_to_parameters.items() if node in read}
    blocks = {name.removeprefix("model.") for name in names if "_block" in name}
    assert blocks and all(name.startswith("up_blocks.1.resnets.1.") for name in blocks)
    assert not [name for name in names if "attn" in name]


def test_without_it_nothing_changes() -> None:
    assert sdxl.component("unet") is sdxl.component("unet", {"tf32": True, "encoder": True})
    assert sdxl.component("vae_decoder", request(0).options) is sdxl.component("vae_decoder")
    assert not any(v.endswith(deepcache.SHALLOW) for row in sdxl.COMPONENTS for v in row.variants)
