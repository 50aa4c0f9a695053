"""What ``listing`` returns, as people read it. Each function gives something that `write` prints."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from buildtool.listing import Row, Verified
from buildtool.store.files import human_size
from buildtool.store.store import Pruned

if TYPE_CHECKING:
    from rich.console import RenderableType

_WIDE = 10_000


def write(renderable: RenderableType, file: IO[str] | None = None) -> None:
    """Prints one of the renderings below to stdout, or to ``file``; whole lines where that is no terminal."""
    from rich.console import Console

    out = file or sys.stdout
    # In a pipe a line is a record: don't fold it at 80 columns.
    console = Console(file=out, width=None if out.isatty() else _WIDE, highlight=False, markup=False, emoji=False)
    console.print(renderable, soft_wrap=isinstance(renderable, str))


def human_age(days: float) -> str:
    """``5 min``, ``3 h``, ``12 d``."""
    if days < 1 / 24:
        return f"{max(days, 0) * 1440:.0f} min"
    return f"{days * 24:.0f} h" if days < 2 else f"{days:.0f} d"


def render_ls(rows: Sequence[Row]) -> RenderableType:
    """A table, a row an artifact; damaged ones say so below."""
    if not rows:
        return "Nothing is built here yet. Try: sdxl-build torch --model tiny --gpu cpu"
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("model", "size", "batch", "precision", "backend", "target"):
        table.add_column(name, no_wrap=True, justify="right" if name == "batch" else "left")
    for name in ("age", "own", "shared"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("path", overflow="fold")
    for row in rows:
        if row.size:
            cells = [row.model, row.size, str(row.batch), row.precision, row.backend, row.target]
            cells.append(human_age(row.age_days))
        else:
            cells = [row.model, "?", "", "", "", row.target, ""]
        cells += [human_size(row.own_bytes), human_size(row.shared_bytes), row.path]
        table.add_row(*(Text(cell, style="red" if row.problem else "") for cell in cells))
    damaged = [Text(f"Damaged: {row.problem}", style="red") for row in rows if row.problem]
    return Group(table, *damaged)


def render_stale(rows: Sequence[Row]) -> str:
    """A paragraph an artifact: its path, why it is stale, and how to build it again."""
    if not rows:
        return "Every artifact fits this machine."
    return "\n".join(
        "\n".join([row.path, *(f"  {reason}" for reason in row.stale), f"  Build it again: {row.rebuild}"])
        for row in rows
    )


def render_show(shown: Mapping[str, Any]) -> str:
    """One manifest, without the tensors of its weights: those are in ``--json``."""
    key = shown["key"]
    lines = [
        shown["path"],
        f"  model        {key['model']}" + "".join(f", {n} {key[n]}" for n in ("revision", "variant") if key[n]),
        f"  made for     {key['target']}, GPU {key['gpu_name']}",
        f"  pictures     {key['width']}x{key['height']}, {key['batch']} a call, {key['precision']}, VAE {key['vae']}",
        f"  backend      {key['backend']}" + _pairs(key["options"], ": "),
        f"  key          {shown['key_digest']}",
        f"  built        {shown['created']} by: {' '.join(shown['command'])}",
        f"  built with  {_pairs(shown['built_with'], ' ')}",
        f"  toolchain   {_pairs(key['toolchain'], ' ')}",
        f"  seconds     {_pairs({n: round(s, 1) for n, s in shown['build_seconds'].items()}, ' ')}",
        f"  on disk      {human_size(shown['own_bytes'])} own, {human_size(shown['shared_bytes'])} shared",
        "  components",
    ]
    for name, component in shown["components"].items():
        lines.append(f"    {name}: {component['loader']}, {component['precision']}, code {component['code_key'][:8]}")
        for variant, described in component["variants"].items():
            parts = [part["file"] for part in described.get("segments", ())] or [described["file"]]
            lines.append(f"      {variant}: {', '.join(parts)}, {_check(described['check'])}")
            lines += [f"        in   {_tensor(tensor)}" for tensor in described["inputs"]]
            lines += [f"        out  {_tensor(tensor)}" for tensor in described["outputs"]]
    lines.append("  files")
    width = max((len(name) for name in shown["files"]), default=0)
    for name, entry in shown["files"].items():
        lines.append(f"    {name:<{width}}  {human_size(entry['size']):>10}  {entry['sha256']}")
    lines += [f"  Damaged: {problem}" for problem in shown["problems"]]
    return "\n".join(lines)


def _pairs(values: Mapping[str, Any], before: str) -> str:
    text = ", ".join(f"{name} {value}" for name, value in values.items())
    return f"{before}{text}" if text else ""


def _tensor(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['name']} {tensor['dtype']} {list(tensor['shape'])}"


def _errors(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {error:.2g}" for name, error in errors.items())


def _check(check: Mapping[str, Any]) -> str:
    if check["status"] == "deferred":
        return f"check deferred: {check['reason']}"
    return f"passed with error {_errors(check['error'])} of {check['tolerance']:.2g} allowed"


def render_verify(result: Verified) -> str:
    """A line for each problem and each variant, and the verdict."""
    lines = list(result.problems)
    for name, found in result.variants.items():
        verdict = "passed" if found.get("passed") else "FAILED"
        error, tolerance = found.get("error"), found.get("tolerance")
        said = f": error {_errors(error)}" if isinstance(error, dict) else ""
        said += f" of {tolerance:.2g} allowed" if isinstance(tolerance, (int, float)) else ""
        lines.append(f"{name} {verdict}{said}")
    if result.passed:
        ran = "its files and its golden tensors" if result.checked else "its files; the golden tensors did not run"
        lines.append(f"{result.path} is as it was built: {ran}.")
    else:
        lines.append(f"{result.path} is damaged or wrong. Build it again with --force, and see: sdxl-build show")
    return "\n".join(lines)


def render_prune(pruned: Pruned, dry_run: bool) -> str:
    """A line for each thing that goes, and what that frees."""
    named = [("artifact", pruned.artifacts), ("code", pruned.code), ("weights", pruned.blobs)]
    named += [("unfinished build", pruned.staging), ("compiled kernels", pruned.kernels)]
    verb = "Would remove" if dry_run else "Removed"
    lines = [f"{verb} {what} {path}" for what, paths in named for path in paths]
    lines += [f"Left alone: {problem} To remove it: rm -r '{path}'" for path, problem in pruned.damaged]
    freed = f"{human_size(pruned.bytes)} {'would come' if dry_run else 'came'} free."
    return "\n".join([*lines, freed if pruned.removed else "Nothing to remove."])
