"""``benchmarks/peers.py``: the checkpoint's tensors, cut out of a weights file."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks import peers


def test_sources_are_cut_out_of_joined_padded_and_channels_last_tensors(tmp_path: Path) -> None:
    convolution = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).reshape(2, 3, 2, 2)
    layout = convolution.to(memory_format=torch.channels_last)
    q, k = torch.arange(6.0).reshape(2, 3), torch.arange(6.0, 15.0).reshape(3, 3)
    bias = torch.tensor([1.0, 2.0])
    stored: dict[str, Any] = {
        "conv": ((2, 3, 2, 2), layout.stride(), ("conv.weight",), layout.permute(0, 2, 3, 1).flatten()),
        "qk": ((5, 3), (3, 1), ("q.weight", "k.weight"), torch.cat([q, k]).flatten()),
        "padded": ((16,), (1,), ("bias",), torch.cat([bias, torch.zeros(14)])),
        "unknown": ((1,), (1,), ("of.another.class",), torch.zeros(1)),
    }
    save_file({name: flat.contiguous() for name, (*_, flat) in stored.items()}, tmp_path / "w.safetensors")
    tensors = {n: SimpleNamespace(shape=s, stride=st, sources=src) for n, (s, st, src, _) in stored.items()}
    described: Any = SimpleNamespace(weights="w.safetensors", tensors=tensors)
    wanted = {
        "conv.weight": ("model.conv.weight", (2, 3, 2, 2)),
        "q.weight": ("model.q.weight", (2, 3)),
        "k.weight": ("model.k.weight", (3, 3)),
        "bias": ("model.bias", (2,)),
    }
    found = peers.stored_sources(tmp_path, described, wanted, torch.device("cpu"))
    assert found.keys() == {name for name, _ in wanted.values()}
    for name, tensor in (("conv.weight", convolution), ("q.weight", q), ("k.weight", k), ("bias", bias)):
        assert torch.equal(found[f"model.{name}"], tensor)


def test_peers_by_name() -> None:
    assert peers.title("max-autotune", "unet") == "torch.compile max-autotune, channels-last"
    assert peers.title("eager-nchw", "vae_decoder") == "diffusers eager, NCHW"
    assert peers.title("eager", "text_encoder_2") == "transformers eager"
