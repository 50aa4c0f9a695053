"""The two keys: what shapes compiled code (no weights), and what makes a whole artifact."""

import hashlib
from typing import Any

import msgspec

KEY_VERSION = 1


def canonical_json(value: object) -> bytes:
    """JSON without spaces, dictionaries sorted, structs in their fields' order: equal values give equal bytes."""
    return msgspec.json.encode(value, order="deterministic")


def digest_of(value: object) -> str:
    """sha256, as 64 hex digits, of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


class CodeKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that shapes one component's compiled code; no weights.

    Every field is required: an ingredient that defaults to empty is a wrong hit waiting to happen.
    Ingredients that do not apply are spelled out as such (a text encoder has width 0).
    """

    key_version: int
    backend: str
    component: str
    config: dict[str, Any]
    """The component's architecture, as its config.json spells it."""
    target: str
    """``sm90``, or ``cpu-<instruction set>``."""
    gpu_name: str
    """The exact GPU where the backend tunes for it, else ``any``."""
    width: int
    height: int
    """Pixels; 0 for components that see none."""
    batch: int
    """Images per call; 0 for components that run one prompt at a time."""
    precision: str
    options: dict[str, Any]
    toolchain: dict[str, str]

    @property
    def digest(self) -> str:
        return digest_of(self)


class ArtifactKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that makes an artifact what it is. Every field is required."""

    key_version: int
    backend: str
    model: str
    """The model's folder name in the store, ``[a-z0-9._-]+``."""
    revision: str
    variant: str
    weights: dict[str, str]
    """Component -> digest of its source weights."""
    configs: dict[str, dict[str, Any]]
    """Component -> its config.json; also ``scheduler`` and ``pipeline``."""
    tokenizers: dict[str, str]
    """Tokenizer -> digest of its source files."""
    target: str
    gpu_name: str
    width: int
    height: int
    batch: int
    precision: str
    vae: str
    options: dict[str, Any]
    toolchain: dict[str, str]

    @property
    def digest(self) -> str:
        return digest_of(self)

    @property
    def folder(self) -> str:
        """``<model>/<target>/<W>x<H>-b<N>-<precision>-<backend>-<key8>``, below the store's root."""
        size = f"{self.width}x{self.height}-b{self.batch}"
        return f"{self.model}/{self.target}/{size}-{self.precision}-{self.backend}-{self.digest[:8]}"


def flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """A key's ingredients by dotted name, so that two keys can be compared one by one."""
    builtins = msgspec.to_builtins(value)
    if not isinstance(builtins, dict):
        return {prefix: builtins}
    flat: dict[str, Any] = {}
    for name, item in builtins.items():
        path = f"{prefix}.{name}" if prefix else name
        flat.update(flatten(item, path) if isinstance(item, dict) and item else {path: item})
    return flat


def differences(a: object, b: object) -> dict[str, tuple[Any, Any]]:
    """Ingredients in which two keys differ: dotted name -> (a's value, b's value), None if absent."""
    left, right = flatten(a), flatten(b)
    found = {n: (left.get(n), right.get(n)) for n in sorted(left.keys() | right.keys()) if left.get(n) != right.get(n)}
    # An empty dictionary against one with entries: the entries say it all.
    return {n: pair for n, pair in found.items() if not ({} in pair and any(o.startswith(f"{n}.") for o in found))}
