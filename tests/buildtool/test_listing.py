"""ls, show, verify and prune as data and as text. The exporter and the check are stand-ins."""

import importlib.metadata
import io
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buildtool import golden, listing, listing_text
from buildtool.store import manifest
from buildtool.store.errors import SdxlError
from buildtool.store.machine import Gpu
from buildtool.store.manifest import Manifest
from buildtool.store.store import Store

H100 = Gpu(index=0, name="NVIDIA H100", target="sm90", memory_bytes=80 * 10**9, driver="580.159")
VERSIONS = {"torch": "2.13.0", "cuda": "13.0"}


def machine(gpus: tuple[Gpu, ...] = (), isas: tuple[str, ...] = ("avx2",), **versions: str) -> listing.Machine:
    """A stand-in for this machine."""
    return listing.Machine(gpus=gpus, versions={**VERSIONS, **versions}.get, cpu_runs=isas.__contains__)


def text(renderable: Any) -> str:
    out = io.StringIO()
    listing_text.write(renderable, out)
    return out.getvalue()


@pytest.fixture
def exporter(standin: Any, store: Store) -> Any:
    return standin.StandInExporter(store)


@pytest.fixture
def built(standin: Any, exporter: Any) -> Path:
    path: Path = exporter.build(standin.example_key())
    return path


# ls


def test_ls_lists_what_a_person_asks_for(store: Store, exporter: Any, standin: Any) -> None:
    created = (datetime.now(timezone.utc) - timedelta(days=3)).isoformat()
    key = standin.example_key(width=128, height=96, batch=2)
    path = exporter.build(key, created=created)
    [row] = listing.ls(store)
    assert (row.path, row.model, row.size, row.batch) == (str(path), "tiny", "128x96", 2)
    assert (row.precision, row.backend, row.target, row.created) == ("fp32", "torch", "cpu-avx2", created)
    assert row.age_days == pytest.approx(3, abs=0.01)
    assert row.shared_bytes == 64_000 + 20_000
    assert row.own_bytes == 3000 + (path / manifest.MANIFEST).stat().st_size
    assert row.rebuild == "sdxl-build torch --model tiny"
    assert (row.problem, row.stale) == ("", [])
    assert msgspec.json.decode(msgspec.json.encode(row))["age_days"] == row.age_days


def test_ls_of_nothing(store: Store) -> None:
    assert listing.ls(store) == listing.ls(store, stale=True) == []
    assert "sdxl-build torch" in text(listing_text.render_ls([]))


def test_ls_names_what_is_wrong(store: Store, exporter: Any, standin: Any) -> None:
    whole = exporter.build(standin.example_key())
    holed = exporter.build(standin.example_key(batch=2))
    broken = exporter.build(standin.example_key(batch=4))
    undated = exporter.build(standin.example_key(batch=8), created="yesterday")
    (holed / "golden.safetensors").unlink()
    (broken / manifest.MANIFEST).write_bytes(b"{}")
    rows = {row.path: row for row in listing.ls(store)}
    assert rows[str(whole)].problem == ""
    assert "golden.safetensors is missing" in rows[str(holed)].problem
    assert "not a valid manifest" in rows[str(broken)].problem
    assert (rows[str(broken)].model, rows[str(broken)].target) == ("tiny", "cpu-avx2")
    assert "'yesterday'" in rows[str(undated)].problem
    said = text(listing_text.render_ls(list(rows.values())))
    assert said.count("Damaged: ") == 3


def test_ls_in_a_pipe_is_a_line_an_artifact_with_its_whole_path(store: Store, standin: Any, tmp_path: Path) -> None:
    far = Store(tmp_path / ("deep/" * 30) / "with [brackets] and spaces")
    path = standin.StandInExporter(far).build(standin.example_key())
    lines = text(listing_text.render_ls(listing.ls(far))).splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(str(path))


def test_listing_imports_neither_torch_nor_rich() -> None:
    program = "import sys, buildtool.listing, buildtool.listing_text, buildtool.store.store\n"
    program += "print(sorted({'torch', 'rich', 'filelock', 'numpy', 'asyncio'} & sys.modules.keys()))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ls_of_a_folder_that_may_not_be_read(store: Store, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SdxlError, match="cannot be read by this user"):
        listing.ls(store)


# ls --stale


def example(standin: Any, **changes: Any) -> Manifest:
    built_with = changes.pop("built_with", {})
    listed: Manifest = standin.example_manifest(standin.example_key(**changes), {}, built_with=built_with)
    return listed


def test_the_machine_that_built_it_is_not_stale(standin: Any) -> None:
    assert listing.stale_reasons(example(standin), machine()) == []
    changes = {"target": "sm90", "gpu_name": "NVIDIA H100", "built_with": {"driver": "580.159"}}
    assert listing.stale_reasons(example(standin, **changes), machine((H100,))) == []
    # one engine for several GPUs, and one that isn't tuned for a name
    assert listing.stale_reasons(example(standin, target="sm86+sm90"), machine((H100,))) == []
    # what the toolchain names beside packages can't be looked up, and doesn't count
    assert listing.stale_reasons(example(standin, toolchain={"exporter": "3"}), machine()) == []


@pytest.mark.parametrize(
    ("changes", "here", "reason"),
    [
        ({}, machine(torch="2.14.0"), "It was built with torch 2.13.0; here is 2.14.0."),
        ({"toolchain": {"cuda": "12.8"}}, machine(), "It was built with cuda 12.8; here is 13.0."),
        (
            {"toolchain": {"tensorrt": "10.1"}},
            machine(),
            "It needs tensorrt 10.1, which is not installed here.",
        ),
        ({"target": "cpu-avx512"}, machine(), "It is for processors with avx512, which this one lacks."),
        ({"target": "sm90"}, machine(), "It is for sm90; here is no GPU."),
        ({"target": "sm86"}, machine((H100,)), "It is for sm86; here is NVIDIA H100 (sm90)."),
        (
            {"target": "sm90", "gpu_name": "NVIDIA H200"},
            machine((H100,)),
            "It is for NVIDIA H200 (sm90); here is NVIDIA H100 (sm90).",
        ),
        (
            {"target": "sm90", "built_with": {"driver": "570.1"}},
            machine((H100,)),
            "It was built under driver 570.1; here is 580.159.",
        ),
    ],
)
def test_stale_says_why(standin: Any, changes: dict[str, Any], here: listing.Machine, reason: str) -> None:
    assert listing.stale_reasons(example(standin, **changes), here) == [reason]


def test_ls_stale_lists_only_those_with_the_command(store: Store, exporter: Any, standin: Any) -> None:
    exporter.build(standin.example_key())
    command = ("sdxl-build", "torch", "--model", "my model", "--gpu", "cpu")
    old = exporter.build(standin.example_key(toolchain={"torch": "2.11.0"}), command=command)
    damaged = exporter.build(standin.example_key(batch=2))
    (damaged / manifest.MANIFEST).write_bytes(b"{}")
    [row] = listing.ls(store, stale=True, here=machine())
    assert row.path == str(old)
    assert row.rebuild == "sdxl-build torch --model 'my model' --gpu cpu"
    assert text(listing_text.render_stale([row])).splitlines() == [
        str(old),
        "  It was built with torch 2.11.0; here is 2.13.0.",
        f"  Build it again: {row.rebuild}",
    ]
    assert "fits" in text(listing_text.render_stale([]))


def test_this_machine_knows_its_own_torch() -> None:
    here = listing.this_machine()
    torch = here.versions("torch")
    assert torch is not None and torch.split("+")[0] == importlib.metadata.version("torch").split("+")[0]
    assert here.versions("msgspec") == msgspec.__version__
    assert here.versions("no-such-package") is None


# show


def test_show_has_the_whole_manifest(built: Path) -> None:
    shown = listing.show(built)
    plain = manifest.as_dict(manifest.read(built))
    assert {name: shown[name] for name in plain} == plain
    assert (shown["path"], shown["problems"]) == (str(built), [])
    assert shown["own_bytes"] + shown["shared_bytes"] > 87_000
    msgspec.json.encode(shown)
    said = text(listing_text.render_show(shown))
    for part in (shown["key_digest"], "unet.cfg.pt2", "weights/unet.safetensors", "sample float32 [2, 4, 8, 8]"):
        assert part in said
    assert "sdxl-build torch --model tiny" in said

    (built / "golden.safetensors").unlink()
    assert "is missing" in text(listing_text.render_show(listing.show(built)))


def test_show_of_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(SdxlError, match="does not exist"):
        listing.show(tmp_path / "nothing")


# verify

PASSED = {"error": {"sample": 1e-6}, "tolerance": 1e-4, "passed": True}
FAILED = {"error": {"sample": 0.5}, "tolerance": 1e-4, "passed": False}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a stand-in in the place of ``runtimes.check``: a program that notes what it is told, and does as told."""
    script = tmp_path / "stand_in_check.py"

    def install(body: str) -> Path:
        noted = tmp_path / "arguments"
        note = f"open({str(noted)!r}, 'w').write(repr([*sys.argv[1:], sys.stdin.read()]))"
        script.write_text(f"import json, os, sys\n{note}\n{body}\n")
        monkeypatch.setattr(golden, "_CHECK", (str(script),))
        return noted

    return install


def says(variants: dict[str, Any], code: int) -> str:
    return f"print('a library talks'); print(json.dumps({{'variants': {variants!r}}})); sys.exit({code})"


def test_verify_passes(built: Path, check: Any) -> None:
    noted = check(says({"unet.cfg": PASSED}, 0))
    result = listing.verify(built)
    assert result == listing.Verified(
        path=str(built), problems=[], variants={"unet.cfg": PASSED}, checked=True, passed=True
    )
    assert noted.read_text() == repr(["-", "--json", f"{built}\n"])
    said = text(listing_text.render_verify(result))
    assert "unet.cfg passed: error sample 1e-06 of 0.0001 allowed" in said
    assert "is as it was built" in said


def test_verify_fails_with_the_measured_error(built: Path, check: Any) -> None:
    check(says({"unet.cfg": FAILED, "unet.nocfg": PASSED}, 1))
    result = listing.verify(built)
    assert (result.passed, result.checked, result.problems) == (False, True, [])
    assert "unet.cfg FAILED: error sample 0.5" in text(listing_text.render_verify(result))


def test_a_damaged_artifact_is_not_run(built: Path, check: Any) -> None:
    noted = check(says({"unet.cfg": PASSED}, 0))
    path = built / "unet.cfg.pt2"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    result = listing.verify(built)
    assert (result.passed, result.checked, len(result.problems)) == (False, False, 1)
    assert "unet.cfg.pt2 was changed" in result.problems[0]
    assert not noted.exists()
    assert "is damaged" in text(listing_text.render_verify(result))


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (
            "print('what it said', file=sys.stderr); os.kill(os.getpid(), 11)",
            "died with SIGSEGV: the compiled code doesn't run here. what it said ",
        ),
        ("print('Traceback\\nImportError: no torch', file=sys.stderr); sys.exit(1)", "exit code 1 and no result. Imp"),
        ("sys.exit(3)", "ended with exit code 3"),
        ("print('not json')", "no result"),
        ("print(json.dumps({'variants': {}}))", "no result"),
        (says({"unet.cfg": PASSED}, 1), "The check failed."),
    ],
)
def test_a_check_that_dies_is_a_problem(built: Path, check: Any, body: str, problem: str) -> None:
    check(body)
    result = listing.verify(built)
    assert not result.passed
    assert problem in result.problems[0]
    assert "\n" not in result.problems[0]


def test_verify_of_files_alone(built: Path, check: Any) -> None:
    noted = check("sys.exit(1)")
    counted: list[int] = []
    result = listing.verify(built, golden=False, progress=counted.append)
    assert (result.passed, result.checked) == (True, False)
    assert sum(counted) == 64_000 + 20_000 + 3000
    assert not noted.exists()
    assert "did not run" in text(listing_text.render_verify(result))


def test_verify_of_no_artifact(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(SdxlError):
            listing.verify(folder)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 knows no PYTHONSAFEPATH")
def test_a_folder_called_runtimes_right_here_is_not_run(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtimes").mkdir()
    monkeypatch.chdir(tmp_path)
    where = "import runtimes, sys; sys.stderr.write(str(list(runtimes.__path__)))"
    monkeypatch.setattr(golden, "_CHECK", ("-c", where))
    [problem] = listing.verify(built).problems
    assert str(Path(listing.__file__).parents[1] / "runtimes") in problem


# prune


@pytest.mark.parametrize(("given", "days"), [("30d", 30), ("12h", 0.5), ("2w", 14), (" 1.5D ", 1.5), ("0d", 0)])
def test_ages(given: str, days: float) -> None:
    assert listing.parse_age(given) == days


@pytest.mark.parametrize("given", ["", "30", "d", "-1d", "1y", "1d2h", "1 d"])
def test_what_is_no_age(given: str) -> None:
    with pytest.raises(SdxlError, match="--older-than"):
        listing.parse_age(given)


def test_prune_says_what_goes(store: Store, exporter: Any, standin: Any) -> None:
    old = exporter.build(standin.example_key(), created="2020-01-01T00:00:00Z")
    broken = exporter.build(standin.example_key(batch=2))
    (broken / manifest.MANIFEST).write_bytes(b"{}")
    planned = listing.prune(store, older_than="30d", dry_run=True)
    said = text(listing_text.render_prune(planned, dry_run=True))
    assert f"Would remove artifact {old}" in said
    assert "would come free" in said
    assert f"rm -r '{broken}'" in said
    assert old.exists()
    pruned = listing.prune(store, older_than="30d")
    assert not old.exists()
    assert f"Removed artifact {old}" in text(listing_text.render_prune(pruned, dry_run=False))
    plain = listing.pruned_as_dict(pruned, dry_run=False)
    assert plain["artifacts"] == [str(old)]
    assert plain["damaged"][0]["path"] == str(broken)
    msgspec.json.encode(plain)
    assert "Nothing to remove." in text(listing_text.render_prune(listing.prune(store), dry_run=False))


def test_words_for_sizes_and_ages() -> None:
    sizes = [listing_text.human_size(n) for n in (0, 999, 1000, 8_500_000, 5.2e9, 3e12, 3e15)]
    assert sizes == ["0 bytes", "999 bytes", "1.0 kB", "8.5 MB", "5.2 GB", "3.0 TB", "3000.0 TB"]
    assert [listing_text.human_age(d) for d in (-1, 0.001, 0.5, 1.9, 30)] == ["0 min", "1 min", "12 h", "46 h", "30 d"]
