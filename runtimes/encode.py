"""Prompts and sizes to the UNet's conditions, as diffusers' ``encode_prompt`` and ``_get_add_time_ids``."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from buildtool.store.manifest import Manifest
from runtimes.artifact import Artifact
from runtimes.embeddings import Embeddings, tokenizers
from runtimes.refiner import is_refiner

log = logging.getLogger("runtimes")

Encoded = tuple[Tensor, Tensor]
"""Hidden states (77, D) of all encoders side by side, and the pooled embedding (P,)."""


class PromptEncoder:
    """The text encoders of an artifact, with their tokenizers. Equal prompts are encoded once a call."""

    def __init__(self, artifact: Artifact, embeddings: Embeddings) -> None:
        self._artifact, self._embeddings = artifact, embeddings
        self._words: tuple[str, ...] = ()
        self._firsts: dict[str, int] = {}
        self._tokenizers = tokenizers(artifact)

    def __call__(self, prompts: Sequence[tuple[str, str]]) -> Encoded:
        """Encodes (prompt, prompt_2) pairs: (N, 77, D) and (N, P). A refiner's one encoder reads the first, as in
        diffusers."""
        if self._words != self._embeddings.words:
            self._words = self._embeddings.words
            self._firsts = {name: tokenizer.learn(self._words) for name, tokenizer in self._tokenizers.items()}
        self._embeddings.write(self._artifact, self._firsts)
        known: dict[tuple[str, str], Encoded] = {}
        for pair in prompts:
            if pair not in known:
                known[pair] = self._encode(pair)
        return torch.stack([known[p][0] for p in prompts]), torch.stack([known[p][1] for p in prompts])

    def _encode(self, pair: tuple[str, str]) -> Encoded:
        ids = []
        for tokenizer, text in zip(self._tokenizers.values(), pair, strict=False):
            tokens, cut = tokenizer.encode([text])
            ids.append(tokens.to(self._artifact.device))
            if cut[0] and not (ids[1:] and pair[0] == pair[1]):
                limit = self._artifact.manifest.pipeline.max_prompt_tokens
                log.warning("The prompt is cut at %d tokens; left out: %r", limit, cut[0])
        made = [self._artifact.engine(name)(input_ids=each) for name, each in zip(self._tokenizers, ids, strict=True)]
        return torch.cat([hidden for hidden, *_ in made], dim=-1)[0], made[-1][1][0].clone()


Pair = tuple[int, int]
"""(height, width) or (top, left) in pixels, as diffusers has them."""


@dataclass(frozen=True)
class Sizes:
    """A call's arguments about sizes; None as in diffusers."""

    original: Pair | None
    crop: Pair
    target: Pair | None
    negative_original: Pair | None
    negative_crop: Pair
    negative_target: Pair | None
    score: float
    negative_score: float


def time_ids(sizes: Sizes, manifest: Manifest, own: Pair, image_to_image: bool) -> tuple[Tensor, Tensor]:
    """SDXL's micro-conditioning (1, 6) and that of the negative prompt: original size, crop, target size; a refiner's
    (1, 5): original size, crop, aesthetic score.

    Args:
        own: the picture's size.
        image_to_image: whether a picture is the start, for which diffusers has other rules.
    """
    s, original, target = sizes, sizes.original or own, sizes.target or own
    if is_refiner(manifest):
        return (
            _row(*original, *s.crop, s.score),
            _row(*(s.negative_original or original), *s.negative_crop, s.negative_score),
        )
    positive = _row(*original, *s.crop, *target)
    if image_to_image:  # takes each by itself, and the crop of the positive ones
        return positive, _row(*(s.negative_original or original), *s.crop, *(s.negative_target or target))
    if s.negative_original is not None and s.negative_target is not None:
        return positive, _row(*s.negative_original, *s.negative_crop, *s.negative_target)
    return positive, positive


def _row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)
