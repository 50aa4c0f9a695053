"""LoRA files: names, shapes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from buildtool.store import lora
from buildtool.store.errors import SdxlError

SIZES = {
    "unet": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight": (8, 8),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight": (8, 8),
        "down_blocks.0.resnets.1.conv1.weight": (8, 72),
        "down_blocks.0.downsamplers.0.conv.weight": (8, 72),
        "mid_block.resnets.1.time_emb_proj.weight": (8, 8),
        "mid_block.attentions.0.proj_in.weight": (8, 8),
        "up_blocks.0.attentions.2.proj_out.weight": (8, 8),
        "up_blocks.0.upsamplers.0.conv.weight": (8, 72),
        "up_blocks.1.resnets.0.conv_shortcut.weight": (8, 8),
        "time_embedding.linear_2.weight": (8, 8),
    },
    "text_encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)},
    "text_encoder_2": {"text_projection.weight": (8, 8)},
}


def write(path: Path, *bases: str, down: str = ".lora_down.weight", up: str = ".lora_up.weight", **more: Any) -> Path:
    tensors = {f"{b}{down}": torch.zeros(4, 8) for b in bases} | {f"{b}{up}": torch.zeros(8, 4) for b in bases}
    save_file({**tensors, **more.get("tensors", {})}, path, metadata=more.get("metadata"))
    return path


def only(path: Path) -> tuple[str, str, lora.Product]:
    ((component, found),) = lora.products(path, SIZES).items()
    ((name, product),) = found.items()
    return component, name.removesuffix(".weight"), product


@pytest.mark.parametrize(
    ("base", "component", "module"),
    [
        # As SDXL LoRAs that are about spell them (kohya's scripts: the original code's numbers, 2 layers a block).
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "unet",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_unet_middle_block_1_proj_in", "unet", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_emb_layers_1", "unet", "mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_1_proj_out", "unet", "up_blocks.0.attentions.2.proj_out"),
        ("lora_unet_output_blocks_3_0_skip_connection", "unet", "up_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_time_embed_2", "unet", "time_embedding.linear_2"),
        ("lora_unet_mid_block_attentions_0_proj_in", "unet", "mid_block.attentions.0.proj_in"),
        (
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "text_encoder",
            "text_model.encoder.layers.0.self_attn.q_proj",
        ),
        ("lora_te2_text_projection", "text_encoder_2", "text_projection"),
    ],
)
def test_kohyas_names(tmp_path: Path, base: str, component: str, module: str) -> None:
    path = write(tmp_path / "a.safetensors", base, tensors={f"{base}.alpha": torch.tensor(2.0, dtype=torch.bfloat16)})
    assert only(path) == (
        component,
        module,
        lora.Product(f"{base}.lora_up.weight", f"{base}.lora_down.weight", 0.5),
    )
    assert lora.touched(path) == {component}


@pytest.mark.parametrize(
    ("base", "module"),
    [
        ("lora_unet_input_blocks_2_0_in_layers_2", "down_blocks.0.resnets.1.conv1"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
    ],
)
def test_convolutions(tmp_path: Path, base: str, module: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{base}.lora_down.weight": torch.zeros(4, 8, 3, 3), f"{base}.lora_up.weight": torch.zeros(8, 4, 1, 1)}
    save_file(tensors, path)
    assert only(path)[:2] == ("unet", module)


@pytest.mark.parametrize(
    ("base", "down", "up"),
    [
        ("unet.{}to_out.0", ".lora_A.weight", ".lora_B.weight"),
        ("unet.{}to_out.0", ".lora.down.weight", ".lora.up.weight"),
        ("unet.{}processor.to_out", "_lora.down.weight", "_lora.up.weight"),
    ],
)
def test_diffusers_names(tmp_path: Path, base: str, down: str, up: str) -> None:
    attention = "down_blocks.1.attentions.0.transformer_blocks.0.attn1."
    path = write(tmp_path / "a.safetensors", base.format(attention), down=down, up=up)
    component, module, product = only(path)
    assert (component, module, product.factor) == ("unet", f"{attention}to_out.0", 1.0)


def test_alpha_of_diffusers_metadata(tmp_path: Path) -> None:
    names = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    told = {"lora_adapter_metadata": '{"text_encoder_2.lora_alpha": 8, "unet.lora_alpha": 1}'}
    assert (
        only(write(tmp_path / "a.safetensors", "text_encoder_2.text_projection", **names, metadata=told))[2].factor == 2
    )
    told = {"lora_adapter_metadata": '{"text_encoder_2.use_rslora": true}'}
    with pytest.raises(SdxlError, match="use_rslora"):
        only(write(tmp_path / "a.safetensors", "text_encoder_2.text_projection", **names, metadata=told))


TO = "lora_te2_text_projection"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"lora_unet_nowhere.lora_up.weight": torch.zeros(8, 4)}, "lora_unet_nowhere.lora_up.weight is not understood"),
        ({f"{TO}.dora_scale": torch.zeros(8)}, f"{TO}.dora_scale is not understood"),
        ({f"{TO}.lora_mid.weight": torch.zeros(4, 4)}, f"{TO}.lora_mid.weight is not understood"),
        ({"lora_te2_text_projection.lora_up.weight": torch.zeros(8, 5)}, "make no product"),
        ({"lora_te2_text_projection.lora_up.weight": torch.zeros(6, 4)}, "text_projection.weight is"),
        ({"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.alpha": torch.tensor(1.0)}, "lacks its other half"),
        ({f"text_encoder_2.text_projection.lora_{n}.weight": torch.zeros(4, 4) for n in "AB"}, "two spellings|make"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, tensors: dict[str, Any], words: str) -> None:
    path = write(tmp_path / "a.safetensors", TO, tensors=tensors)
    with pytest.raises(SdxlError, match=words) as caught:
        lora.products(path, SIZES)
    assert "\n" not in str(caught.value)


def test_products_for_what_nothing_reads_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", TO, "lora_te1_text_model_encoder_layers_1_mlp_fc1")
    unread = {"text_encoder": ["text_model.encoder.layers.1.mlp.fc1.weight"]}
    assert lora.products(path, SIZES, unread=unread).keys() == {"text_encoder_2"}


def test_no_lora_files(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for data in (b"", b"hello, world", b"\xff" * 40):
        path.write_bytes(data)
        with pytest.raises(SdxlError, match="no safetensors file"):
            lora.touched(path)
    with pytest.raises(SdxlError, match=r"text\.weight is for no component"):
        lora.touched(write(path, tensors={"text.weight": torch.zeros(1)}))


def test_a_scale_follows_the_file(tmp_path: Path) -> None:
    path, odd = tmp_path / "a.safetensors", tmp_path / "b:2"
    path.touch()
    odd.touch()
    assert lora.parse(str(path)) == lora.Lora(path, 1.0)
    assert lora.parse(f"{path}:-0.5") == lora.Lora(path, -0.5)
    assert lora.parse(str(odd)) == lora.Lora(odd, 1.0)
    assert str(lora.parse(f"{path}:0.8")) == f"{path}:0.8"
    for text, word in ((f"{path}:nan", "finite"), (f"{path}:x", "does not exist"), ("none.safetensors:1", "not exist")):
        with pytest.raises(SdxlError, match=word):
            lora.parse(text)
