"""The VAE's attention in parts of its rows, against diffusers' own."""

import copy
from pathlib import Path

import pytest
import torch

from buildtool import models
from exporters import sdxl, vae_attention


@pytest.mark.parametrize("largest", [1 << 25, 1000, 96])
@torch.no_grad()
def test_a_decoder_gives_what_diffusers_gives(micro_model: Path, monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    monkeypatch.setattr(vae_attention, "LARGEST", largest)
    source = models.resolve(str(micro_model))
    vae = sdxl.component("vae_decoder").reference(source.configs["vae"], source.tensors("vae"), "cpu")
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    (wanted,) = vae(latents)
    other = copy.deepcopy(vae)
    assert vae_attention.in_parts(other) == 2  # the encoder's and the decoder's
    (made,) = other(latents)
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    for parameter in other.model.decoder.mid_block.attentions[0].to_v.parameters():
        parameter.mul_(3)
    assert not torch.allclose(other(latents)[0], wanted, rtol=1e-2), "the attention matters here"


@torch.no_grad()
def test_half_precision_is_as_near_as_diffusers_own() -> None:
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    attn = Attention(64, heads=1, dim_head=64, bias=True, norm_num_groups=8, residual_connection=False, eps=1e-6)
    maps = torch.randn(1, 64, 16, 16) * 3
    exact = attn(maps)
    half = copy.deepcopy(attn).half()
    own = (half(maps.half()).float() - exact).norm()
    half.processor = vae_attention.InParts()
    assert (half(maps.half()).float() - exact).norm() < 1.2 * own


def test_many_parts_are_left_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = torch.randn(3, 2, 65, 8, generator=torch.Generator().manual_seed(0)).unbind()
    wanted = vae_attention.attention(query, key, value)
    products: list[int] = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda *factors: products.append(1) or bmm(*factors))
    monkeypatch.setattr(vae_attention, "LARGEST", 2 * 65)  # a row at a time
    torch.testing.assert_close(vae_attention.attention(query, key, value), wanted)
    assert not products
    vae_attention.attention(query[:, :64], key[:, :64], value[:, :64])
    assert len(products) == 2 * vae_attention.MOST_PARTS
