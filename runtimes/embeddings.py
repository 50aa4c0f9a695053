"""Textual inversion at run time: new words, whose vectors lie in spare rows of the text encoders' word tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

from buildtool.store.errors import SdxlError
from runtimes import embedding_files
from runtimes.artifact import Artifact
from runtimes.embedding_files import TABLE, Embedding, names
from runtimes.memory import text_encoders
from runtimes.prompt import Tokenizer

Rows = tuple[int, Tensor]
"""The first row's number, and the rows (n, width)."""


class Embeddings:
    """The textual inversions that some artifacts of one model know.

    Args:
        artifacts: of one pipeline.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._artifacts = artifacts
        self.active: tuple[Embedding, ...] = ()
        self.words: tuple[str, ...] = ()
        """What tokenizers have to know, in the order of their rows."""
        self._vectors: dict[str, Tensor] = {}
        self._written: dict[tuple[str, str], int] = {}

    @torch.inference_mode()  # the weights may have been loaded in it, and then only it may change them
    def use(self, embeddings: Sequence[Embedding]) -> None:
        """Makes these words, and no others, known. Rows that are no longer used get their original bits back.

        Raises:
            SdxlError: a file is no textual inversion of this model, a word is one already, or there is no room.
                What was known before then still is.
        """
        from safetensors.torch import load_file

        wanted = tuple(embeddings)
        for artifact in self._artifacts:
            embedding_files.check(wanted, artifact.manifest)
        words: list[str] = []
        vectors: dict[str, list[Tensor]] = {}
        for each in wanted:
            found, tensors = embedding_files.read(each), load_file(each.path)
            for component, some in found.items():
                vectors.setdefault(component, []).append(tensors[some.key].view(some.count, some.width))
            words += names(each.token, found["text_encoder_2"].count)
        for component, tokenizer in tokenizers(self._artifacts[0]).items():
            known = [word for word in words if tokenizer.knows(word)]
            if known:
                raise SdxlError(
                    f"{known[0]!r} is a word of {component} already.",
                    "Name another: --embedding FILE:TOKEN, such as <new>",
                )
        self._restore()
        self.active, self.words = wanted, tuple(words)
        self._vectors = {component: torch.cat(some) for component, some in vectors.items()}

    def write(self, artifact: Artifact, firsts: dict[str, int]) -> None:
        """Puts the words' vectors into the weights that an artifact's text encoders read, in place.

        It is done before every encoding: weights that were freed come back without them.

        Args:
            firsts: component -> the first word's id.
        """
        for component, first in firsts.items() if self.words else ():
            table, vectors = artifact.tensors(component)[table_of(artifact, component)], self._vectors[component]
            if first + len(vectors) > len(table):
                raise RuntimeError(f"{component} has {len(table)} rows, and {len(vectors)} are wanted from {first} on")
            table[first : first + len(vectors)].copy_(vectors)
            self._written[component, digest_of(artifact, component)] = first
        if artifact.device.type == "cuda" and self.words:
            torch.cuda.synchronize(artifact.device)

    def _restore(self) -> None:
        """Original bits into the tables that were written to, where those weights are still in memory."""
        for artifact in self._artifacts:
            for component in text_encoders(artifact.manifest):
                first = self._written.pop((component, digest_of(artifact, component)), None)
                if first is not None and artifact.holds(component):
                    artifact.restore(component, [table_of(artifact, component)])
        self._written.clear()


def tokenizers(artifact: Artifact) -> dict[str, Tokenizer]:
    """An artifact's tokenizers, by the text encoders that read their ids."""
    folder, there = artifact.folder, text_encoders(artifact.manifest)
    return {name: Tokenizer(folder / f"{name.replace('text_encoder', 'tokenizer')}.json") for name in there}


def table_of(artifact: Artifact, component: str) -> str:
    """The stored tensor that is a text encoder's word table."""
    tensors = artifact.manifest.components[component].tensors
    return next(name for name, stored in tensors.items() if stored.sources == (TABLE,))


def digest_of(artifact: Artifact, component: str) -> str:
    """The digest of a component's weights file."""
    manifest = artifact.manifest
    return manifest.files[manifest.components[component].weights].sha256
