"""The UNet's fp8 blocks, eager on the CPU: bounds that hold, numbers near fp32, every tensor in its place."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from buildtool import models
from exporters import fp8, layout, sdxl, weights
from exporters.base import Request

REQUEST = Request(64, 64, 1, "fp8", "cpu", "sm90", {"fp8": True})
UNET = sdxl.component("unet", REQUEST.options)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [16, 640, 1280])
def test_no_input_takes_a_layer_norm_out_of_range(channels: int) -> None:
    weight, bias = randn(channels), randn(channels, seed=1)
    rows = torch.cat([torch.eye(channels)[:8] * 1e4, -torch.eye(channels)[:8] * 1e4, randn(64, channels, seed=2) * 100])
    scaled = (fp8.derive(f"norm.{name}", (weight, bias)) for name in ("weight", "bias"))
    made = F.layer_norm(rows, (channels,), *scaled)
    assert 0.9 * fp8.LARGEST < made.abs().max() <= fp8.LARGEST  # the bound is one that is reached


def test_no_input_takes_a_geglu_out_of_range() -> None:
    weight, bias, proj, proj_bias = randn(32), randn(32, seed=1), randn(96, 32, seed=2), randn(96, seed=3)
    steps = fp8.geglu_steps(weight, bias, proj, proj_bias)
    worst = torch.cat(
        [proj * weight, -proj * weight, randn(512, 32, seed=4)]
    )  # the rows that each number is largest for
    hidden = F.linear(F.layer_norm(worst, (32,), weight, bias), proj, proj_bias)
    value, gate = hidden.chunk(2, dim=-1)
    made = value * F.gelu(gate) / steps
    assert 0.2 * fp8.LARGEST < made.abs().max() <= fp8.LARGEST


def test_a_weight_times_its_scale_is_the_checkpoints_times_the_steps() -> None:
    norm, linear = (randn(64), randn(64, seed=1)), (randn(32, 64, seed=2), randn(16, 64, seed=3) * 10)
    stored = fp8.derive("product.weight", (*norm, *linear)).to(fp8.TYPE).float()
    scale = fp8.derive("product.scale", (*norm, *linear))
    assert scale.shape == (fp8.SCALES,) and stored.abs().max() == fp8.LARGEST
    wanted = torch.cat(linear) * fp8.norm_steps(*norm)
    assert float((stored * scale[0] - wanted).norm() / wanted.norm()) < 0.04


def loaded(tensors: Mapping[str, Tensor], config: Mapping[str, object], row: sdxl.Component = UNET) -> torch.nn.Module:
    """The graph that is compiled for fp8, with a checkpoint's weights."""
    graph = row.graph(config, "cpu", torch.float16)
    plan = layout.plan(dict(graph.module.named_parameters()), graph.sources, {}, graph.recipes)
    for name, parameter in graph.module.named_parameters():
        stored = plan[name]
        parameter.copy_(weights.physical(name, stored, tensors).as_strided(stored.shape, stored.stride))
    return graph.module


@torch.no_grad()
def test_every_tensor_of_the_blocks_reaches_the_products(micro_model: Path) -> None:
    source = models.resolve(str(micro_model))
    config, tensors = source.configs["unet"], {name: t.clone() for name, t in source.tensors("unet").items()}
    inputs = sdxl.example_inputs(UNET, source.configs, REQUEST, "nocfg")
    exact = {name: tensor.float() for name, tensor in inputs.items()}
    plain = UNET.reference(config, tensors, "cpu")(**exact)[0]
    error = float((loaded(tensors, config)(**inputs)[0] - plain).norm() / plain.norm())
    assert 1e-4 < error < 0.02, "fp16 alone would be nearer"
    block = next(name for name in tensors if ".transformer_blocks.0." in name).partition("attn1")[0]
    block = block.partition("norm")[0].partition("attn2")[0].partition("ff")[0]
    names = [name for name in tensors if name.startswith(block)]
    assert len(names) == 20
    mattered = 0
    for name in names:
        changed = {
            **tensors,
            name: tensors[name] + 3 * tensors[name].std().clamp(min=0.3) * randn(*tensors[name].shape),
        }
        wanted = UNET.reference(config, changed, "cpu")(**exact)[0]
        made = loaded(changed, config)(**inputs)[0]
        moved = float((wanted - plain).norm() / plain.norm())
        error = float((made - wanted).norm() / wanted.norm())
        assert error < max(0.02, 0.2 * moved), name
        mattered += moved > 0.1
    assert mattered >= 12


@pytest.mark.parametrize(
    "others",
    [{"freeu": {"s1": 0.6, "s2": 0.4, "b1": 1.1, "b2": 1.2}}, {"deepcache": {"interval": 2, "branch": 0}}],
    ids=["freeu", "deepcache"],
)
@torch.no_grad()
def test_it_goes_with_what_else_changes_a_unet(micro_model: Path, others: dict[str, object]) -> None:
    source = models.resolve(str(micro_model))
    config, tensors = source.configs["unet"], source.tensors("unet")
    asked = dataclasses.replace(REQUEST, options={"fp8": True, **others})
    row = sdxl.component("unet", asked.options)
    for variant in row.variants:
        inputs = sdxl.example_inputs(row, source.configs, asked, variant)
        exact = {name: tensor.float() for name, tensor in inputs.items()}
        wanted = row.reference(config, tensors, "cpu")(**exact)
        for made, want in zip(loaded(tensors, config, row)(**inputs), wanted, strict=True):
            assert float((made - want).norm() / want.norm()) < 0.03, variant


def test_products_outside_of_the_blocks_stay() -> None:
    source = models.resolve("tiny")
    graph = UNET.graph(source.configs["unet"], "meta", torch.float16)
    eights = {name for name, p in graph.module.named_parameters() if p.dtype == fp8.TYPE}
    assert {name.rpartition(".transformer_blocks.")[2].partition(".")[2] for name in eights} == {
        "attn1.to_qkv.weight", "attn2.to_q.weight", "ff.proj.weight", "ff.out.weight"
    }  # fmt: skip
    assert graph.recipes.keys() <= dict(graph.module.named_parameters()).keys()
