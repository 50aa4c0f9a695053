"""``--dry-run``: what a build would do and take, without doing it."""

from typing import Any

from buildtool import gpu, gpu_room
from buildtool.plan import COMPONENTS, ENCODER, Plan
from buildtool.store import files
from buildtool.store.manifest import Manifest
from buildtool.store.store import Store
from buildtool.store.summary import Summary
from exporters import registry, trt_room
from exporters.base import Request

# Measured (benchmarks/RESULTS.md): fp32 eager reference plus what torch itself takes, and the package's code.
IMPORTS_BYTES = 1_200_000_000
CODE_BYTES = 20_000_000
HELD = {"unet": 1.15}
"""What engines of all variants hold of the weights together, where they are stored once (docs/tensorrt.md)."""


def estimate(planned: Plan) -> dict[str, Any]:
    """A plan as plain data: its key, hit or miss and why, and what a build would take.

    ``disk_bytes`` counts what the store would grow by; ``memory_bytes`` is host memory,
    ``gpu_memory_bytes`` what fp32 eager and one compiler take on a GPU together (0 for a CPU);
    ``seconds`` is what the nearest build of this model took here, or None.
    """
    store = Store(planned.spec.artifacts)
    found = store.find(planned.key)
    nearest = None if found.path else store.nearest(planned.key)
    compiles = [name for name, key in planned.code_keys.items() if store.code(key.digest) is None]
    width = 4 if planned.key.precision == "fp32" else 2
    parameters = planned.source.parameters
    known = _weights_in(store)
    fresh = {of for of in parameters if planned.key.weights[of] not in known}
    largest = max(parameters.values())
    memory = IMPORTS_BYTES * (1 + len(compiles)) + largest * (4 + width)
    disk = sum(parameters[of] * width for of in fresh) + CODE_BYTES * bool(compiles)
    weighted = registry.backend(planned.spec.backend).weighted
    if weighted:
        held = _weights_in(store, planned.key.backend)
        new = [name for name in compiles if planned.key.weights[(COMPONENTS | ENCODER)[name]] not in held]
        disk = sum(int(parameters[(COMPONENTS | ENCODER)[name]] * width * HELD.get(name, 1)) for name in new)
        disk += CODE_BYTES * bool(compiles)
        reference = gpu_room.reference_bytes(parameters, _request(planned)) if planned.spec.golden else 0
        memory = max(reference, trt_room.build_bytes(largest, width) if compiles else 0)
    on_gpu = planned.target.device == "cuda" and (not weighted or gpu.usable(planned.target))
    return {
        "key": planned.key.digest,
        "path": str(found.path or store.base / planned.key.folder),
        "hit": found.path is not None,
        "reason": found.reason,
        "nearest": str(nearest[0]) if nearest else None,
        "differs": {name: list(pair) for name, pair in nearest[1].items()} if nearest else {},
        "compiles": [] if found.path else compiles,
        "disk_bytes": 0 if found.path else disk,
        "disk_free_bytes": files.free_bytes(store.base),
        "memory_bytes": 0 if found.path else memory,
        "gpu_memory_bytes": _gpu_memory(planned) if on_gpu and not found.path else 0,
        "seconds": None if found.path else _seconds(store, planned),
        "command": list(planned.command),
    }


def _gpu_memory(planned: Plan) -> int:
    parameters, request = planned.source.parameters, _request(planned)
    return gpu_room.reference_bytes(parameters, request) + gpu_room.compiler_bytes(parameters, request)


def _request(planned: Plan) -> Request:
    return Request(
        width=planned.width,
        height=planned.height,
        batch=planned.spec.batch,
        precision=planned.key.precision,
        device=planned.target.torch_device,
        target=planned.target.name,
    )


def _weights_in(store: Store, backend: str = "") -> set[str]:
    """Digests of the source weights that artifacts in the store (of a backend, or of any) were made of."""
    found = [m for _, m in store.summaries() if isinstance(m, Summary) and backend in ("", m.key.backend)]
    return {digest for summary in found for digest in summary.key.weights.values()}


def _seconds(store: Store, planned: Plan) -> float | None:
    """Seconds that a full build of the same model, backend and precision took, the latest of them."""
    like = [
        m
        for _, m in store.artifacts()
        if isinstance(m, Manifest)
        and (m.key.model, m.key.backend, m.key.precision)
        == (planned.key.model, planned.key.backend, planned.key.precision)
    ]
    if not like:
        return None
    return round(sum(max(like, key=lambda m: m.created).build_seconds.values()), 1)


def render(told: dict[str, Any]) -> str:
    """An estimate as people read it."""
    lines = [f"{told['path']}", f"  key      {told['key']}"]
    if told["hit"]:
        return "\n".join([*lines, "  hit      it is there; nothing would be done"])
    lines.append(f"  miss     {told['reason']}")
    if told["nearest"]:
        lines.append(f"  nearest  {told['nearest']}, which differs in")
        for name, (asked, there) in told["differs"].items():
            lines.append(f"             {name}: {_short(there)} there, {_short(asked)} asked for")
    lines.append(f"  compiles {', '.join(told['compiles']) or 'nothing: its code is in the store'}")
    lines.append(
        f"  disk     {files.human_size(told['disk_bytes'])} of {files.human_size(told['disk_free_bytes'])} free"
    )
    lines.append(f"  memory   about {files.human_size(told['memory_bytes'])}")
    if told["gpu_memory_bytes"]:
        lines.append(
            f"  GPU      about {files.human_size(told['gpu_memory_bytes'])}; with less, fp32 eager runs on the CPU"
        )
    seconds = told["seconds"]
    took = f"about {seconds:.0f} s of work" if seconds is not None else "not known: nothing like it was built here"
    return "\n".join([*lines, f"  time     {took}"])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
