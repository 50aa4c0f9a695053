"""SDXL's text encoders as plain modules, with the parameter names of the checkpoint files.

Written out here because transformers renames the modules between releases and hooks its outputs;
a graph for export wants neither. The golden tensors come from transformers' own classes, so an
error here fails the build's check.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv_proj(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(out.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, act: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = Attention(width, config["num_attention_heads"])
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, config["intermediate_size"], config["hidden_act"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = nn.Embedding(config["max_position_embeddings"], config["hidden_size"])

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, config: dict[str, Any], layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(layers))


class TextModel(nn.Module):
    def __init__(self, config: dict[str, Any], layers: int, final_norm: bool) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, layers)
        if final_norm:
            self.final_layer_norm = nn.LayerNorm(config["hidden_size"], eps=config["layer_norm_eps"])


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' defaults for what a config.json leaves out."""
    base = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "max_position_embeddings": 77, "eos_token_id": 49407}
    return {**base, **config}


class TextEncoder(nn.Module):
    """CLIP's text model up to its penultimate layer, which is all that SDXL reads of it.

    Takes ``input_ids`` (N, 77) int64; gives hidden states (N, 77, hidden_size).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        config = _defaults(config)
        self.text_model = TextModel(config, config["num_hidden_layers"] - 1, final_norm=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.text_model.embeddings(input_ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return (x,)


class TextEncoderWithProjection(nn.Module):
    """CLIP's text model with projection: penultimate hidden states and the pooled embedding.

    Takes ``input_ids`` (N, 77) int64; gives (N, 77, hidden_size) and (N, projection_dim).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        config = _defaults(config)
        self.eos_token_id = config["eos_token_id"]
        self.text_model = TextModel(config, config["num_hidden_layers"], final_norm=True)
        self.text_projection = nn.Linear(config["hidden_size"], config["projection_dim"], bias=False)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        x = self.text_model.embeddings(input_ids)
        for layer in self.text_model.encoder.layers[:-1]:
            x = layer(x)
        penultimate = x
        x = self.text_model.final_layer_norm(self.text_model.encoder.layers[-1](x))
        # The end token: configs made before its id was mended say 2, and there it is the highest id
        # (transformers, modeling_clip.py).
        end = input_ids if self.eos_token_id == 2 else (input_ids == self.eos_token_id).to(torch.int32)
        pooled = x[torch.arange(x.shape[0], device=x.device), end.argmax(dim=-1)]
        return penultimate, self.text_projection(pooled)


def sources(name: str) -> tuple[str, ...]:
    """The checkpoint's tensors behind a parameter: the fused projection holds q, k and v."""
    if ".qkv_proj." in name:
        return tuple(name.replace(".qkv_proj.", f".{part}_proj.") for part in "qkv")
    return (name,)
