"""The component table: text encoders as transformers has them, inputs as the UNet takes them."""

from typing import Any

import pytest
import torch

from buildtool import models
from exporters import clip, sdxl
from exporters.base import ExportError, Request


def config(**changes: Any) -> dict[str, Any]:
    base = {
        "vocab_size": 100,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
        "projection_dim": 24,
        "bos_token_id": 98,
        "pad_token_id": 99,
    }
    return {**base, **changes}


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 99, 50])
@torch.no_grad()
def test_text_encoders_equal_transformers(projected: bool, act: str, end: int) -> None:
    import transformers

    settings = config(hidden_act=act, eos_token_id=end)
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    torch.manual_seed(0)
    model = cls(transformers.CLIPTextConfig(**settings)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tensors = {n if n.startswith("text_") else f"text_model.{n}": t for n, t in model.state_dict().items()}

    row = sdxl.component("text_encoder_2" if projected else "text_encoder")
    reference = row.reference(settings, tensors, "cpu")
    graph = row.graph(settings, "cpu", torch.float32)
    for name, parameter in graph.module.named_parameters():
        parameter.copy_(torch.cat([tensors[s] for s in graph.sources[name]]))

    ids = torch.randint(3, 97, (1, 77))
    ids[0, 0], ids[0, 20:] = 98, 99
    ids[0, 11] = 50
    for mine, theirs in zip(graph.module(ids), reference(ids), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_fused_projections_name_their_sources() -> None:
    name = "text_model.encoder.layers.0.self_attn.qkv_proj.bias"
    parts = [f"text_model.encoder.layers.0.self_attn.{p}_proj.bias" for p in "qkv"]
    assert clip.sources(name) == tuple(parts)
    assert clip.sources("text_projection.weight") == ("text_projection.weight",)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named() -> None:
    module = torch.nn.Linear(4, 3, device="meta")
    with pytest.raises(ExportError, match="no tensor 'bias'"):
        sdxl.load_weights(module, {"weight": torch.zeros(3, 4)}, str, "cpu")
    with pytest.raises(ExportError, match=r"weight has shape \(4, 3\); its config says \(3, 4\)"):
        sdxl.load_weights(module, {"weight": torch.zeros(4, 3), "bias": torch.zeros(3)}, str, "cpu")


@pytest.mark.parametrize(
    ("precision", "upcast", "computes"), [("fp16", True, "fp32"), ("fp16", False, "fp16"), ("bf16", True, "bf16")]
)
def test_the_vae_is_upcast_where_diffusers_upcasts_it(precision: str, upcast: bool, computes: str) -> None:
    request = Request(width=64, height=64, batch=1, precision=precision, device="cpu", target="sm90")
    assert sdxl.component("vae_decoder").precision({"vae": {"force_upcast": upcast}}, request) == computes
    assert sdxl.component("unet").precision({"vae": {"force_upcast": upcast}}, request) == precision


def test_a_tile_is_the_decoders_size_alone() -> None:
    configs = models.resolve("tiny").configs
    options = {"vae_tile": [128, 64]}
    request = Request(width=256, height=256, batch=2, precision="fp32", device="cpu", target="cpu", options=options)
    wanted = {"vae_decoder": (2, 4, 8, 16), "vae_encoder": (2, 3, 256, 256), "unet": (4, 4, 32, 32)}
    for name, shape in wanted.items():
        row = sdxl.component(name, options)
        assert row.inputs(configs, request, row.variants[0], torch.float32)[0].shape == shape


def test_cfg_doubles_the_batch() -> None:
    configs: dict[str, dict[str, Any]] = {
        "unet": {
            "in_channels": 4,
            "projection_class_embeddings_input_dim": 2816,
            "addition_time_embed_dim": 256,
            "cross_attention_dim": 2048,
        },
        "vae": {"block_out_channels": [1, 2, 3, 4]},
        "text_encoder": {},
    }
    request = Request(width=1024, height=768, batch=3, precision="fp16", device="cpu", target="sm90")
    row = sdxl.component("unet")
    for variant, batch in (("cfg", 6), ("nocfg", 3)):
        shapes = {s.name: s.shape for s in row.inputs(configs, request, variant, torch.float16)}
        assert shapes == {
            "sample": (batch, 4, 96, 128),
            "timestep": (1,),
            "encoder_hidden_states": (batch, 77, 2048),
            "text_embeds": (batch, 1280),
            "time_ids": (batch, 6),
        }


@pytest.mark.parametrize(("model", "embedded"), [("base", 2816), ("refiner", 2560)])
def test_a_refiner_reads_a_score_in_place_of_the_target_size(model: str, embedded: int) -> None:
    unet = {"in_channels": 4, "addition_time_embed_dim": 256, "cross_attention_dim": 2048}
    configs: dict[str, dict[str, Any]] = {
        "unet": {**unet, "projection_class_embeddings_input_dim": embedded},
        "vae": {"block_out_channels": [1, 2, 3, 4]},
        **({"text_encoder": {}} if model == "base" else {}),
    }
    request = Request(width=1024, height=768, batch=2, precision="fp16", device="cpu", target="sm90")
    made = sdxl.example_inputs(sdxl.component("unet"), configs, request, "nocfg")
    assert made["text_embeds"].shape == (2, 1280)
    wanted = [768, 1024, 0, 0, 768, 1024] if model == "base" else [768, 1024, 0, 0, 6]
    assert made["time_ids"].tolist() == [wanted, wanted]
