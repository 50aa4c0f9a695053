"""A UNet cut into parts: they compute what the whole computes, and share nothing."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from buildtool import models
from exporters import layout, sdxl, segments, weights
from exporters.base import Request
from exporters.segment_layers import cut, layers


def request(options: dict[str, Any], height: int = 64) -> Request:
    sides = {"width": 64, "height": height}
    return Request(batch=1, precision="fp32", device="cpu", target="cpu", options=options, **sides)


def test_the_largest_part_is_as_small_as_can_be() -> None:
    generator = torch.Generator().manual_seed(0)
    for length, count in ((2, 2), (5, 3), (8, 4), (9, 2)):
        sizes = torch.randint(1, 30, (length,), generator=generator).tolist()
        found = cut(sizes, count)
        assert found == sorted(set(found)) and len(found) == count and found[-1] == length

        def largest(ends: Any, sizes: list[int] = sizes) -> int:
            return max(sum(sizes[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True))

        every = ([*inner, length] for inner in itertools.combinations(range(1, length), count - 1))
        assert largest(found) == min(map(largest, every))


def test_full_size_sdxl_is_cut_between_its_transformers() -> None:
    """Of the 2.57 billion numbers of its UNet, 350 million lie in each of six transformers, which are not cut."""
    source = models.resolve("random:sdxl-base")
    config = source.configs["unet"]
    unet = sdxl._diffusers_model(config)
    first = sum(p.numel() for name in segments.FIRST for p in unet.get_submodule(name).parameters())
    for count, most in ((3, 0.9e9), (6, 0.49e9), (8, 0.41e9)):
        sizes = [
            sum(p.numel() for layer in part.own for m in layer.modules for p in unet.get_submodule(m).parameters())
            for part in segments.parts(unet, config, count)
        ]
        assert max(sizes) <= most and sum(sizes) + first == source.parameters["unet"]


FREEU = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}


@pytest.mark.parametrize(
    ("options", "height"),
    [({"segments": 2}, 64), ({"segments": 3, "freeu": FREEU}, 64), ({"segments": 15}, 200)],
)
@torch.no_grad()
def test_parts_compute_what_the_whole_computes(options: dict[str, Any], height: int, micro_model: Path) -> None:
    """Sizes that don't halve evenly too: 200 pixels are 25 latents, then 13. 15 parts are a layer each."""
    source, asked = models.resolve(str(micro_model)), request(options, height)
    configs, tensors = source.configs, source.tensors("unet")
    row = sdxl.component("unet", options)
    assert row.whole is not None
    known = sdxl.example_inputs(row.whole, configs, asked, "cfg")
    (wanted,) = row.whole.reference(configs["unet"], tensors, "cpu")(**known)
    used: list[str] = []
    for number in range(1, options["segments"] + 1):
        graph = row.graph_of(f"cfg.{number}", configs["unet"], "cpu", torch.float32)
        for name, parameter in graph.module.named_parameters():
            assert name.startswith(f"segment{number}.")
            parameter.copy_(torch.cat([tensors[source] for source in graph.sources[name]]))
            used += graph.sources[name]
        specs = row.inputs(configs, asked, f"cfg.{number}", torch.float32)
        for spec in specs:
            assert sdxl.spec_of(spec.name, known[spec.name]) == spec
        made = graph.module(**{spec.name: known[spec.name] for spec in specs})
        known.update(zip(graph.outputs, made, strict=True))
    torch.testing.assert_close(known["noise_pred"], wanted, rtol=1e-5, atol=1e-5)
    assert sorted(used) == sorted(tensors)  # each once


@torch.no_grad()
def test_parts_in_fp8_are_as_near_as_the_whole_in_fp8(micro_model: Path) -> None:
    source, options = models.resolve(str(micro_model)), {"segments": 3, "fp8": True}
    asked = dataclasses.replace(request(options), precision="fp8", target="sm90")
    configs, tensors = source.configs, source.tensors("unet")
    row = sdxl.component("unet", options)
    assert row.whole is not None
    known = sdxl.example_inputs(row.whole, configs, asked, "cfg")
    exact = {name: tensor.float() for name, tensor in known.items()}
    (wanted,) = row.whole.reference(configs["unet"], tensors, "cpu")(**exact)
    for number in (1, 2, 3):
        graph = row.graph_of(f"cfg.{number}", configs["unet"], "cpu", torch.float16)
        plan = layout.plan(dict(graph.module.named_parameters()), graph.sources, {}, graph.recipes)
        for name, parameter in graph.module.named_parameters():
            stored = plan[name]
            parameter.copy_(weights.physical(name, stored, tensors).as_strided(stored.shape, stored.stride))
        specs = row.inputs(configs, asked, f"cfg.{number}", torch.float16)
        made = graph.module(**{spec.name: known[spec.name] for spec in specs})
        known.update(zip(graph.outputs, made, strict=True))
    error = float((known["noise_pred"] - wanted).norm() / wanted.norm())
    assert 1e-3 < error < 0.02, "fp16 alone would be nearer"


def test_a_part_is_given_what_it_reads_and_no_more(micro_model: Path) -> None:
    config = models.resolve(str(micro_model)).configs["unet"]
    parts = sdxl._parts(config, 3)
    assert [part.inputs[-2:] for part in parts[1:]] == [("embedding", "encoder_hidden_states")] * 2
    given: set[str] = set()
    for part in parts[:-1]:
        assert not given & set(part.outputs)
        given |= set(part.outputs)
    taken = {name for part in parts[1:] for name in part.inputs} - {"encoder_hidden_states"}
    assert taken == given and parts[-1].outputs == ("noise_pred",)
    assert [layer.kind for layer in layers(config)][-1] == "out"
