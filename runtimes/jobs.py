"""What a run is asked for: prompts from the command line, a file, or lines of JSON."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from buildtool.store.errors import SdxlError
from runtimes.schedulers import SCHEDULERS

MAX_SEED = 2**63 - 1

Count = Annotated[int, Meta(ge=1)]


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of a prompts file; what it leaves out comes from the command line."""

    prompt: str
    negative_prompt: str | UnsetType | None = UNSET
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    width: Count | None = None
    height: Count | None = None
    steps: Count | None = None
    guidance: Annotated[float, Meta(ge=0)] | None = None
    guidance_until: Annotated[float, Meta(ge=0, le=1)] | None = None
    num_images: Count | None = None
    scheduler: str | None = None
    image: str | None = None
    strength: Annotated[float, Meta(ge=0, le=1)] | None = None
    lora: tuple[str, ...] | None = None
    """``FILE[:SCALE]`` each."""
    embedding: tuple[str, ...] | None = None
    """``FILE[:TOKEN]`` each."""
    refine_at: Annotated[float, Meta(gt=0, lt=1)] | None = None
    refine_strength: Annotated[float, Meta(gt=0, le=1)] | None = None
    out: str | None = None

    def __post_init__(self) -> None:
        check_text(self.prompt)
        if isinstance(self.negative_prompt, str):
            check_text(self.negative_prompt)
        if self.scheduler not in (None, *SCHEDULERS):
            raise ValueError(f"there is no scheduler {self.scheduler!r}; there are {', '.join(SCHEDULERS)}")
        for name in ("guidance", "guidance_until", "strength", "refine_at", "refine_strength"):
            if not math.isfinite(getattr(self, name) or 0):  # ranges let NaN through
                raise ValueError(f"{name} is not a finite number")
        if self.refine_at is not None and self.refine_strength is not None:
            raise ValueError("a refiner either goes on (refine_at) or makes anew (refine_strength): give one of them")


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """How one picture is made. Sizes are in pixels, ``guidance_until`` is a fraction of the steps,
    ``scheduler`` a name in ``runtimes.schedulers.SCHEDULERS``; ``image`` is the file that the run started from
    and ``strength`` how much of the steps it took, both None for text to image. ``refiner`` is the model that went on
    at the fraction ``refine_at`` of the schedule, or that made ``refine_strength`` of the picture anew."""

    prompt: str
    negative_prompt: str | None
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    guidance_until: float
    scheduler: str
    image: str | None = None
    strength: float | None = None
    lora: tuple[str, ...] = ()
    """``FILE[:SCALE]`` each, in the weights while the picture is made."""
    embedding: tuple[str, ...] = ()
    """``FILE:TOKEN`` each, words that the prompts may have."""
    refiner: str | None = None
    refine_at: float | None = None
    refine_strength: float | None = None


def check_text(text: str) -> str:
    """The text itself, if it is valid Unicode; a command line or ``\\ud800`` in JSON can hold what isn't.

    Raises:
        ValueError: it is not.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode text ({error.reason})") from None
    return text


def parse_line(line: bytes | str) -> Job:
    """A job from one line of JSON.

    Raises:
        SdxlError: not a JSON object, or a field that is unknown, missing or out of its range.
    """
    job: Job = _decode(line, Job)
    return job


def read(path: Path) -> list[Job]:
    """The jobs of a prompts file: JSON lines, one JSON array, or text with one prompt a line.

    A name that ends in .jsonl, .ndjson or .json, or a first line that opens a JSON object, means
    JSON. Blank lines count for nothing.

    Raises:
        SdxlError: the file cannot be read, is empty, or one of its lines is wrong (which one is said).
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SdxlError(
            f"The prompts file {path} does not exist.", "Give one with a prompt a line, or --prompt TEXT."
        ) from None
    except UnicodeDecodeError as error:
        raise SdxlError(f"The prompts file {path} is not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise SdxlError(f"The prompts file {path} cannot be read: {error.strerror}.") from None
    jobs = list(_jobs(path, text))
    if not jobs:
        raise SdxlError(f"The prompts file {path} holds no prompt.", "Write one prompt a line.")
    return jobs


def _jobs(path: Path, text: str) -> Iterator[Job]:
    is_json = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
    if is_json and text.lstrip().startswith("["):
        try:
            yield from _decode(text, list[Job])
        except SdxlError as error:
            raise SdxlError(f"{path}: {error.message}") from None
        return
    # '{"' and not '{': some people put weights of words in braces.
    is_json = is_json or re.match(r'\s*\{\s*"', text) is not None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield parse_line(line) if is_json else Job(prompt=line.strip())
        except (SdxlError, ValueError) as error:
            raise SdxlError(f"{path}, line {number}: {error}") from None


def _decode(data: bytes | str, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise SdxlError(f"{error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SdxlError(f"not valid JSON: {str(error).rstrip('.')}.") from None
