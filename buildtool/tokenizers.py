"""Writes the tokenizer.json that the runtime reads: transformers' own ids, padding and truncation built in."""

import importlib
from pathlib import Path
from typing import Any

from buildtool.store.errors import SdxlError

# Prompts on which the written file has to agree with transformers before it is kept.
PROBES = (
    "",
    "A photo of an astronaut riding a horse, 4k!",
    "!!! wow!it's  naïve\tcafé\n\nÅngström 🦊👩‍🚀 漢字 <|endoftext|> <|startoftext|>",
    "red " * 90 + "!",
)


def convert(folder: Path, out: Path, max_length: int = 77) -> None:
    """Turns a CLIP tokenizer's folder into one tokenizer.json.

    The ids are those of ``CLIPTokenizer.from_pretrained(folder)`` called with padding to
    ``max_length`` and truncation, which is how diffusers calls it. A padding token such as SDXL's
    second "!" becomes a special token there, and stays one here.

    Args:
        folder: vocab.json and merges.txt, or tokenizer.json, with their configuration files.
        out: the file to write.
        max_length: tokens, the first and the last one included; the text encoder's positions.

    Raises:
        SdxlError: a file is missing or damaged, or the tokenizer has another length.
    """
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).is_file():
                raise SdxlError(f"The tokenizer in {folder} has no {name}.", "Is the checkpoint complete?")
    tokenizer = _load(folder)
    if tokenizer.model_max_length < 10_000 and tokenizer.model_max_length != max_length:  # 1e30: none is set
        raise SdxlError(
            f"The tokenizer in {folder} makes {tokenizer.model_max_length} tokens; the text encoder takes {max_length}."
        )

    expected = _ids(tokenizer, max_length)  # also leaves padding and truncation set on the backend
    text = tokenizer.backend_tokenizer.to_str()
    from tokenizers import Tokenizer

    written = Tokenizer.from_str(text)
    if [written.encode(probe).ids for probe in PROBES] != expected:
        raise SdxlError(f"The tokenizer in {folder} has settings that tokenizer.json cannot hold.")
    out.write_text(text, encoding="utf-8")


def _ids(tokenizer: Any, max_length: int) -> list[list[int]]:
    encoded = tokenizer(list(PROBES), padding="max_length", max_length=max_length, truncation=True)
    ids: list[list[int]] = encoded.input_ids
    return ids


def _load(folder: Path) -> Any:
    transformers: Any = importlib.import_module("transformers")
    # Version 4's CLIPTokenizer is written in Python and has no tokenizer.json to give; version 5's is the fast one.
    name = "CLIPTokenizerFast" if transformers.__version__.startswith("4.") else "CLIPTokenizer"
    try:
        tokenizer = getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = str(error).strip().partition("\n")[0]
        raise SdxlError(f"The tokenizer in {folder} cannot be read: {reason}") from error
    return tokenizer
