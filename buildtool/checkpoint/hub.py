"""Models of the Hugging Face hub: from its offline cache first, downloaded when something is missing there."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from buildtool.checkpoint import configs, folder
from buildtool.checkpoint.configs import COMPONENTS, CONFIG_FILES
from buildtool.checkpoint.files import find_weights, variants
from buildtool.store.errors import SdxlError

BASE = "stabilityai/stable-diffusion-xl-base-1.0"

_NETWORK_LIBRARIES = ("httpcore", "httpx", "httpx2", "requests", "ssl", "urllib3")
_CONFIGS = tuple(f"{name}/{CONFIG_FILES.get(name, 'config.json')}" for name in (*COMPONENTS, "scheduler"))
_SMALL = ("model_index.json", *_CONFIGS, *(f"{t}/{file}" for t in folder.TOKENIZERS for file in folder.TOKENIZER_FILES))
_WEIGHTS = re.compile(
    r"(?P<folder>[^/]+)/(?:diffusion_pytorch_model|model)"
    r"(?:\.safetensors\.index(?:\.(?P<index_variant>\w+))?\.json"
    r"|(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<late_variant>\w+))?\.safetensors)"
)


def snapshot(repo: str, revision: str | None, variant: str) -> Path:
    """The folder of a model's snapshot in the hub's cache, complete; its name is the commit.

    Nothing is asked of the network when the cache has all that is needed.

    Raises:
        SdxlError: no such model or revision, gated, not SDXL, not in the cache and no network.
    """
    cached = _cached(repo, "model_index.json", revision)
    if cached is not None and _complete(cached, variant, strict=True):
        return cached
    try:
        return _download(repo, revision, variant)
    except SdxlError:
        # A model of which only some components have the variant looks incomplete until the hub's list is read.
        if cached is not None and _complete(cached, variant, strict=False):
            return cached
        raise


def config_snapshot() -> Path:
    """SDXL base's configs and tokenizers, for a single file that brings none.

    Raises:
        SdxlError: not in the cache and no network.
    """
    cached = _cached(BASE, "model_index.json", None)
    if cached is not None and _has_configs(cached):
        return cached
    with _explained(BASE, None, "Or give its configs and tokenizers: --config DIR (a diffusers folder)."):
        return _fetch(BASE, None, _SMALL)


def vae_snapshot(repo: str) -> Path:
    """The folder of a VAE's snapshot in the hub's cache: config.json and weights in it or in ``vae/``.

    Raises:
        SdxlError: no such model, no VAE in it, not in the cache and no network.
    """
    for prefix in ("", "vae/"):
        cached = _cached(repo, f"{prefix}config.json", None)
        root = cached and cached / prefix
        if root and (weights := find_weights(root, "")) and all(path.exists() for path in weights.files):
            return root
    with _explained(repo, None, f"Fetch it where there is a network: hf download {repo}"):
        names = _list(repo, None)
        for prefix in ("", "vae/"):
            wanted = (f"{prefix}config.json", f"{prefix}diffusion_pytorch_model.safetensors")
            if names.issuperset(wanted):
                return _fetch(repo, None, wanted) / prefix
        raise SdxlError(f"{repo} holds no VAE (config.json and diffusion_pytorch_model.safetensors).")


def _cached(repo: str, file: str, revision: str | None) -> Path | None:
    """The snapshot's root in the cache, if it has ``file``."""
    from huggingface_hub import errors, try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repo, file, revision=revision)
    except errors.HFValidationError:
        raise SdxlError(f"{repo} is not a hub id.", "Give owner/name.") from None
    if not isinstance(found, str):
        return None
    return Path(found).parents[file.count("/")]


def _complete(root: Path, variant: str, *, strict: bool) -> bool:
    """Whether a snapshot has every file that `folder.read` needs.

    Args:
        root: the snapshot.
        variant: as asked.
        strict: every component must have the variant's files; else one is enough.
    """
    if not _has_configs(root):
        return not folder.is_sdxl(root)  # to be told that it isn't, its index is enough
    wanted = folder.components(configs.read_json(root / "model_index.json"))
    if variant and not any(variant in variants(root / name) for name in wanted):
        return False
    for name in wanted:
        try:
            weights = find_weights(root / name, variant)
        except SdxlError:
            return False
        if weights is None or not all(path.exists() for path in weights.files):
            return False
        if strict and weights.variant != variant:
            return False
    return True


def _has_configs(root: Path) -> bool:
    index = configs.read_json(root / "model_index.json")
    absent = {f"{name}/config.json" for name in COMPONENTS} - {f"{n}/config.json" for n in folder.components(index)}
    return all((root / name).exists() for name in _CONFIGS if name not in absent) and all(
        folder.has_tokenizer(root / name) for name in folder.tokenizers(index)
    )


def _download(repo: str, revision: str | None, variant: str) -> Path:
    at = f" --revision {revision}" if revision else ""
    hint = f"Fetch it where there is a network: hf download {repo}{at}"
    with _explained(repo, revision, hint):
        names = _list(repo, revision)
        if "model_index.json" not in names:
            single = next((name for name in sorted(names) if name.endswith(".safetensors")), "")
            hint = f"For its file: hf download {repo} {single}, then --model FILE." if single else ""
            raise SdxlError(f"{repo} is no diffusers model (no model_index.json).", hint)
        root = _fetch(repo, revision, _SMALL)  # a few MB: what is not SDXL is told before its weights are fetched
        wanted = folder.components(folder.check_kind(root, repo))
        return _fetch(repo, revision, (*_SMALL, *choose_weights(repo, names, variant, wanted)))


def choose_weights(repo: str, names: Iterable[str], variant: str, components: Sequence[str] = COMPONENTS) -> list[str]:
    """The weights files to download: each component's of the variant if it has them, else its plain ones.

    Raises:
        SdxlError: no component has the variant, or one has no safetensors files.
    """
    there: dict[str, dict[str, list[str]]] = {name: {} for name in components}
    for name in sorted(names):
        match = _WEIGHTS.fullmatch(name)
        if match and match["folder"] in there:
            kind = match["index_variant"] or match["variant"] or match["late_variant"] or ""
            there[match["folder"]].setdefault(kind, []).append(name)
    kinds = sorted({kind for files in there.values() for kind in files if kind})
    if variant and variant not in kinds:
        have = f"it has {', '.join(kinds)}" if kinds else "it has none"
        raise SdxlError(f"{repo} has no files of the variant {variant!r}; {have}.", "Leave --variant out.")
    chosen = []
    for component, files in there.items():
        files_of_kind = files.get(variant) or files.get("")
        if not files_of_kind:
            hint = f"Add --variant {kinds[0]}." if kinds else "Pickles are not read: they can run code."
            raise SdxlError(f"{repo} has no {'plain ' if kinds else ''}safetensors files of its {component}.", hint)
        # Where a component has both one file and shards, the one file: find_weights takes it first.
        whole = [name for name in files_of_kind if name.endswith(".safetensors") and "-of-" not in name]
        chosen += whole or files_of_kind
    return chosen


def _list(repo: str, revision: str | None) -> frozenset[str]:
    from huggingface_hub import HfApi

    return frozenset(file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ())


def _fetch(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download

    # The revision as asked, not its commit: the cache then remembers which commit it was, and the next run
    # needs no network.
    return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))


@contextmanager
def _explained(repo: str, revision: str | None, hint: str) -> Iterator[None]:
    """Turns what the hub's client raises into one line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise SdxlError(
            f"{repo} is gated.", f"Accept its terms at https://huggingface.co/{repo}, then run: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise SdxlError(f"{repo} is not on the hub, or is private.", "Check its name, or run: hf auth login") from None
    except errors.RevisionNotFoundError:
        raise SdxlError(f"{repo} has no revision {revision!r}.", "Give a branch, a tag or a commit.") from None
    except Exception as error:
        network = isinstance(error, OSError) or type(error).__module__.split(".")[0] in _NETWORK_LIBRARIES
        if not network:
            raise
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise SdxlError(
                f"The hub's cache cannot be written: {error.strerror}.", "Set $HF_HOME elsewhere."
            ) from None
        at = f" (revision {revision})" if revision else ""
        raise SdxlError(f"{repo}{at} is not whole in the hub's cache, and the hub cannot be reached.", hint) from None
