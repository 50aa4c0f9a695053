"""Files of textual inversion: the vectors that stand for new words. Read before torch is imported."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from buildtool.store.errors import SdxlError
from buildtool.store.files import safetensors_header
from buildtool.store.manifest import Manifest
from runtimes.memory import text_encoders

KEYS = {"text_encoder": ("clip_l", "text_encoders_0"), "text_encoder_2": ("clip_g", "text_encoders_1")}
"""Component -> what its vectors are called: by most tools, and by diffusers' own training scripts."""
TABLE = "text_model.embeddings.token_embedding.weight"
_FORMS = "Files of SDXL with clip_l and clip_g (or text_encoders_0 and text_encoders_1) can be read."


@dataclass(frozen=True)
class Embedding:
    """A file, and the word that its vectors stand for."""

    path: Path
    token: str

    def __str__(self) -> str:
        return f"{self.path}:{self.token}"


@dataclass(frozen=True)
class Vectors:
    """A component's vectors in a file: the tensor's name, how many they are, how many numbers each has."""

    key: str
    count: int
    width: int


def parse(text: str) -> Embedding:
    """``FILE`` or ``FILE:TOKEN``; without a token, the word is the file's name without its ending.

    Raises:
        SdxlError: there is no such file, or the word has spaces.
    """
    path, colon, token = text.rpartition(":")
    whole = Path(text)
    found = Embedding(whole, whole.stem) if whole.exists() or not colon else Embedding(Path(path), token)
    if not found.path.is_file():
        raise SdxlError(
            f"The embedding {found.path} does not exist.", "Give a .safetensors file: --embedding FILE[:TOKEN]"
        )
    if not found.token or found.token.split() != [found.token]:
        raise SdxlError(f"The embedding {found.path} can't be the word {found.token!r}.", "Name one: FILE:TOKEN")
    return found


def names(token: str, count: int) -> list[str]:
    """The words of several vectors: token, token_1, token_2, … (diffusers'), all of which the first stands for."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def read(embedding: Embedding) -> dict[str, Vectors]:
    """A file's vectors by component.

    Raises:
        SdxlError: it is no safetensors file, or not one of SDXL's.
    """
    path = embedding.path
    shapes = _shapes(path)
    found = {}
    for component, keys in KEYS.items():
        key = next((key for key in keys if key in shapes), None)
        if key is None or not 1 <= len(shapes[key]) <= 2:
            raise SdxlError(
                f"{path} is no textual inversion of SDXL: it has {', '.join(sorted(shapes)[:4]) or 'nothing'}.", _FORMS
            )
        count, width = shapes[key] if len(shapes[key]) == 2 else (1, shapes[key][0])
        found[component] = Vectors(key, count, width)
    if len({vectors.count for vectors in found.values()}) > 1 or not all(v.count for v in found.values()):
        counts = " and ".join(str(vectors.count) for vectors in found.values())
        raise SdxlError(f"{path} has {counts} vectors for the two text encoders.", "Download it again.")
    return found


def check(embeddings: Sequence[Embedding], manifest: Manifest) -> None:
    """Raises:
    SdxlError: the artifact has no room for them, or they are of another model.
    """
    if not embeddings:
        return
    spare = int(manifest.key.options.get("spare_tokens", 0))
    count = 0
    words: list[str] = []
    for embedding in embeddings:
        found = read(embedding)
        for component in text_encoders(manifest):
            width = manifest.key.configs[component]["hidden_size"]
            if found[component].width != width:
                raise SdxlError(
                    f"{embedding.path} is of another model: its vectors for {component} have {found[component].width} "
                    f"numbers, {manifest.key.model}'s {width}."
                )
        count += found["text_encoder_2"].count
        words += names(embedding.token, found["text_encoder_2"].count)
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise SdxlError(f"Two embeddings are the word {twice[0]!r}.", "Name them: --embedding FILE:TOKEN")
    if count > spare:
        raise SdxlError(
            f"{', '.join(str(each.path) for each in embeddings)}: {manifest.key.model} would need {count} spare rows "
            f"in its word tables, and has {spare}.",
            f"Build it with them: {with_spare(manifest, count)}",
        )


def with_spare(manifest: Manifest, count: int) -> str:
    """The command that builds the same artifact with so many spare rows, or the torch backend's."""
    words = list(manifest.command)
    if "--spare-tokens" in words:
        at = words.index("--spare-tokens")
        del words[at : at + 2]
    if manifest.key.backend != "torch":
        return f"sdxl-build torch --spare-tokens {count}"
    return shlex.join([*words, "--spare-tokens", str(count)])


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        entries, _, _ = safetensors_header(path)
        entries.pop("__metadata__", None)
        return {name: tuple(entry["shape"]) for name, entry in entries.items()}
    except OSError as error:
        raise SdxlError(f"The embedding {path} cannot be read: {error.strerror}.") from None
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise SdxlError(
            f"The embedding {path} is no safetensors file.", "Pickles (.pt, .bin) are not read: they can run code."
        ) from None
