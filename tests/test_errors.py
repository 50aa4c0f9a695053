"""What a user can mend ends in one line on stderr and the right exit code, at the command line itself."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from buildtool.store import machine, manifest
from tests.runtimes.stand_in import stand_in_artifact

Done = subprocess.CompletedProcess[str]
BUILD = (sys.executable, "-m", "buildtool.cli")
RUN = (sys.executable, "-m", "runtimes.cli")
ROOT = Path(__file__).parents[1]
NEEDS_RTX = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'sdxl-build[trt]'",
)
EMPTY = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
"""A machine without a GPU, whatever this one has."""


def call(*words: object, within: Sequence[str] = (), **environment: str) -> Done:
    """A command line in a process of its own; ``within`` goes before it."""
    command = [*within, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **EMPTY, **environment})


def tiny(store: object, *options: object, **more: Any) -> Done:
    return call(*BUILD, "torch", "--model", "tiny", "--gpu", "cpu", "--artifacts", store, *options, **more)


def draw(folder: object, *options: object, **more: Any) -> Done:
    """One step without guidance, into the folder's parent."""
    settings = ("--prompt", "a red circle", "--steps", "1", "--guidance", "1", "--seed", "1")
    out = ("--out", Path(str(folder)).parent / "picture.png")
    return call(*RUN, "--engine", folder, *settings, *(() if "--out" in options else out), *options, **more)


def one_line(done: Done, *words: str) -> str:
    """The error's line: the only one on stderr, with all of ``words``; nothing on stdout; exit code 1."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert [word for word in words if word not in line] == [], line
    return line


# What was asked for does not exist


def test_unknown_model(tmp_path: Path) -> None:
    one_line(tiny(tmp_path, "--model", "tinny"), "tinny does not exist", "hub id", "folder", ".safetensors")


def test_unknown_gpu(tmp_path: Path) -> None:
    one_line(tiny(tmp_path, "--gpu", "sm999"), "'sm999'", "auto, cpu", "sm90")


def test_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    one_line(tiny(tmp_path, "--gpu", "sm90"), "sm90 was asked for, this machine has none", "--gpu cpu")


def test_no_gpu(tmp_path: Path) -> None:
    one_line(tiny(tmp_path, "--gpu", "auto"), "No GPU was found", "--gpu cpu")


def test_a_resolution_that_cannot_be_built(tmp_path: Path) -> None:
    one_line(tiny(tmp_path, "--resolution", "250x256"), "250x256", "multiples of 8", "--resolution 248x256")


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    done = tiny(tmp_path, "--resolution", "250")
    assert done.returncode == 2 and "write WIDTHxHEIGHT" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [(*BUILD, "show"), (*BUILD, "verify"), (*RUN, "--prompt", "x", "--engine")])
def test_no_such_artifact(tmp_path: Path, command: Sequence[str]) -> None:
    one_line(call(*command, tmp_path / "nowhere"), f"{tmp_path}/nowhere does not exist", "sdxl-build ls")
    one_line(call(*command, tmp_path), f"{tmp_path} has no manifest.json", "sdxl-build ls")


# What is asked of an artifact: these end before any code is loaded, so a stand-in will do


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with a valid manifest and files that no loader would take, 64x64."""
    return stand_in_artifact(tmp_path / "stand-in")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_prompts_file(stand_in: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "prompts.txt").write_text(text)
    done = call(*RUN, "--engine", stand_in, "--prompts", tmp_path / "prompts.txt")
    one_line(done, "prompts.txt holds no prompt", "one prompt a line")


def test_a_size_that_no_artifact_makes(stand_in: Path) -> None:
    one_line(draw(stand_in, "--width", "72"), "a width of 72", "make 64x64", "sdxl-build torch", "--resolution 72x64")


def test_a_size_that_is_no_multiple_of_8(stand_in: Path) -> None:
    one_line(draw(stand_in, "--height", "65"), "A height of 65", "multiples of 8", "make 64x64")


def test_another_digest_than_expected(stand_in: Path) -> None:
    there = manifest.read(stand_in).digest
    one_line(draw(stand_in, "--expect-digest", "ab" * 32), there, "ab" * 32, "sdxl-build show")


def test_files_that_are_not_those_of_the_expected_digest(stand_in: Path) -> None:
    digest = manifest.read(stand_in).digest
    (stand_in / "unet.cfg.pt2").write_bytes(b"edoc")
    one_line(draw(stand_in, "--expect-digest", digest), "unet.cfg.pt2 was changed", "sdxl-build verify")


def test_a_missing_file(stand_in: Path) -> None:
    (stand_in / "unet.cfg.pt2").unlink()
    one_line(draw(stand_in), "unet.cfg.pt2 is missing", "Build it again: sdxl-build torch", "--force")


def test_a_path_that_leaves_the_folder(stand_in: Path) -> None:
    path = stand_in / manifest.MANIFEST
    path.write_text(path.read_text().replace('"unet.cfg.pt2"', '"../unet.cfg.pt2"'))
    one_line(draw(stand_in), "'../unet.cfg.pt2'", "not a path inside the artifact's folder")


def test_a_link_that_leaves_the_folder(stand_in: Path, tmp_path: Path) -> None:
    (stand_in / "unet.cfg.pt2").rename(tmp_path / "elsewhere")
    (stand_in / "unet.cfg.pt2").symlink_to(tmp_path / "elsewhere")
    one_line(draw(stand_in), "unet.cfg.pt2 is a link that leaves", "Build it again")


def test_a_manifest_that_was_edited(stand_in: Path) -> None:
    path = stand_in / manifest.MANIFEST
    path.write_text(path.read_text().replace("2026", "2025", 1))
    one_line(draw(stand_in), "was changed after it was built")


@pytest.mark.parametrize("broken", ["changed", "missing", "extra"])
def test_verify_names_what_is_wrong_and_exits_with_1(stand_in: Path, broken: str) -> None:
    file = stand_in / "unet.cfg.pt2"
    if broken == "missing":
        file.unlink()
    elif broken == "changed":
        file.write_bytes(b"edoc")
    else:
        (stand_in / "extra").write_bytes(b"")
    done = call(*BUILD, "verify", "--files-only", stand_in)
    assert (done.returncode, done.stderr) == (1, "")
    first, last = done.stdout.splitlines()
    said = {"changed": "unet.cfg.pt2 was changed", "missing": "unet.cfg.pt2 is missing", "extra": "not in the manifest"}
    assert said[broken] in first and "damaged or wrong" in last


# The machine


@pytest.mark.parametrize("asked", ["/nowhere/g++", ""])
def test_no_compiler(tmp_path: Path, asked: str) -> None:
    one_line(tiny(tmp_path, CXX=asked), "C++ compiler", f"{asked!r}", "apt-get install g++", "CXX")
    assert not list((tmp_path / "v1").glob("*/cpu-*"))


@pytest.fixture(scope="session")
def mounted() -> Callable[[str], Sequence[str]]:
    """Runs a command where a shell line, such as a mount, was done first, in a mount namespace of its own.

    Without the right to make one these tests are skipped; the store's own tests have stand-ins for such disks.
    """

    def within(line: str) -> Sequence[str]:
        return ["unshare", "--map-root-user", "--mount", "sh", "-ec", f'{line}\nexec "$@"', "sh"]

    if not shutil.which("unshare") or subprocess.run([*within("mount -t tmpfs tmpfs /mnt"), "true"]).returncode:
        pytest.skip("needs a mount namespace")
    return within


def test_a_disk_that_is_too_small(tmp_path: Path, mounted: Callable[[str], Sequence[str]]) -> None:
    done = tiny(tmp_path, within=mounted(f"mount -t tmpfs -o size=1m tmpfs '{tmp_path}'"))
    one_line(done, "This build needs", f"on the disk of {tmp_path}", "are free", "--artifacts DIR")


def test_a_store_that_is_read_only(tmp_path: Path, mounted: Callable[[str], Sequence[str]]) -> None:
    done = tiny(tmp_path, within=mounted(f"mount -t tmpfs -o ro tmpfs '{tmp_path}'"))
    one_line(done, f"{tmp_path} is on a read-only disk", "--artifacts DIR")


def test_a_full_disk_for_pictures(tmp_path: Path, stand_in: Path, mounted: Callable[[str], Sequence[str]]) -> None:
    full = tmp_path / "full"
    full.mkdir()
    fill = f"mount -t tmpfs -o size=64k tmpfs '{full}'\nhead -c 65536 /dev/zero > '{full}/rest'"
    one_line(draw(stand_in, "--out", f"{full}/", within=mounted(fill)), "No space left on device", "--out")


# With a real artifact


def resealed(folder: Path, to: Path, **changes: Any) -> Path:
    """A copy of an artifact whose key says something else, sealed as if it had been built so."""
    shutil.copytree(folder, to)
    read = manifest.read(to)
    key = msgspec.structs.replace(read.key, **changes)
    other = msgspec.structs.replace(read, key=key, key_digest=key.digest)
    (to / manifest.MANIFEST).write_bytes(manifest.encode(other))
    return to


@pytest.mark.slow
def test_the_copies_below_run_but_for_what_they_change(micro_artifact: Path, tmp_path: Path) -> None:
    done = draw(resealed(micro_artifact, tmp_path / "copy"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_artifact_for_a_gpu(micro_artifact: Path, tmp_path: Path) -> None:
    copy = resealed(micro_artifact, tmp_path / "copy", target="sm90", gpu_name="NVIDIA H100 80GB HBM3")
    one_line(draw(copy), "built for sm90", "no GPU here", "sdxl-build doctor")
    done = call(*BUILD, "verify", copy)
    assert done.returncode == 1 and "built for sm90" in done.stdout


@pytest.mark.slow
def test_an_artifact_for_processors_of_another_kind(micro_artifact: Path, tmp_path: Path) -> None:
    foreign = "sve256" if machine.cpu_runs("x86-64") else "avx512"
    copy = resealed(micro_artifact, tmp_path / "copy", target=f"cpu-{foreign}")
    one_line(draw(copy), f"processors with {foreign}", machine.cpu_isa(), "sdxl-build torch")


@pytest.mark.slow
def test_an_artifact_of_another_torch(micro_artifact: Path, tmp_path: Path) -> None:
    was = manifest.read(micro_artifact).key.toolchain
    copy = resealed(micro_artifact, tmp_path / "copy", toolchain={**was, "torch": "2.11.0+cu130"})
    line = one_line(draw(copy), "built with torch 2.11.0+cu130", f"torch {was['torch']} is installed", "sdxl-build")
    done = call(*BUILD, "verify", copy)
    assert done.returncode == 1 and line.removeprefix("Error: ") in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "weights/unet.safetensors", "scheduler.json"])
def test_real_files_that_are_missing(micro_artifact: Path, tmp_path: Path, name: str) -> None:
    copy = resealed(micro_artifact, tmp_path / "copy")
    (copy / name).unlink()
    one_line(draw(copy), f"{name} is missing", "Build it again")


@pytest.mark.slow
def test_a_tokenizer_cut_in_half(micro_artifact: Path, tmp_path: Path) -> None:
    copy = resealed(micro_artifact, tmp_path / "copy")
    data = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(data[: len(data) // 2] + b" " * (len(data) - len(data) // 2))
    one_line(draw(copy), "tokenizer.json cannot be read", "sdxl-build verify")


@pytest.mark.slow
def test_a_read_only_store_has_hits_and_runs(
    micro_artifact: Path, micro_model: Path, store_root: Path, tmp_path: Path, mounted: Callable[[str], Sequence[str]]
) -> None:
    root = store_root.absolute()
    frozen = mounted(f"mount --bind '{root}' '{root}'\nmount -o remount,bind,ro '{root}'")
    words = ("torch", "--model", micro_model, "--gpu", "cpu", "--artifacts", store_root)
    hit = call(*BUILD, *words, within=frozen)
    assert (hit.returncode, hit.stdout) == (0, f"{micro_artifact}\n"), hit.stderr
    made = draw(micro_artifact, "--out", tmp_path / "picture.png", within=frozen)
    assert made.returncode == 0 and (tmp_path / "picture.png").is_file(), made.stderr
    one_line(call(*BUILD, *words, "--batch", "3", within=frozen), f"{store_root} is on a read-only disk")


@pytest.mark.slow
@pytest.mark.parametrize("options", ["noexec", "ro", "size=64k"])
def test_a_temporary_folder_that_code_cannot_be_loaded_from(
    micro_artifact: Path, tmp_path: Path, mounted: Callable[[str], Sequence[str]], options: str
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    within = mounted(f"mount -t tmpfs -o {options} tmpfs '{temporary}'")
    done = draw(micro_artifact, "--out", tmp_path / "picture.png", within=within, TMPDIR=str(temporary))
    one_line(done, "text_encoder.pt2 cannot be loaded", "noexec", "TMPDIR", "sdxl-build verify")


@pytest.mark.slow
def test_a_disk_that_fills_up_while_compiling(
    micro_model: Path,
    micro_artifact: Path,
    store_root: Path,
    tmp_path: Path,
    mounted: Callable[[str], Sequence[str]],
) -> None:
    """The UNet's code, which takes longest to compile, is there."""
    code = Path("v1/code") / manifest.read(micro_artifact).components["unet"].code_key
    small = mounted(
        f"mount -t tmpfs -o size=4m tmpfs '{tmp_path}'\n"
        f"mkdir -p '{tmp_path}/v1/code'\n"
        f"cp -r '{store_root.absolute() / code}' '{tmp_path}/v1/code/'"
    )
    left_over = f"find '{tmp_path}/v1' -mindepth 2 -type f -not -path '*/{code}/*'"
    listing = [*small, "sh", "-c", f'"$@"; code=$?; {left_over} >&2; exit $code', "sh"]
    words = ("torch", "--model", micro_model, "--gpu", "cpu", "--artifacts", tmp_path)
    done = call(*BUILD, *words, within=listing, SDXL_HEADERS="")  # the compiler fills it, and no copy of its headers
    line, *left = done.stderr.splitlines()
    done.stderr = line
    one_line(done, f"The disk of {tmp_path} is full", "--artifacts DIR")
    assert [path for path in left if not path.endswith(".lock")] == []


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(
    micro_model: Path, micro_artifact: Path, store_root: Path, tmp_path: Path
) -> None:
    """A stand-in compiler: says its version, and refuses every file. All code but a text encoder's is there."""
    for name, component in manifest.read(micro_artifact).components.items():
        code = Path("v1/code") / component.code_key
        if name != "text_encoder":
            shutil.copytree(store_root / code, tmp_path / "store" / code)
    fake = tmp_path / "g++"
    fake.write_text(
        '#!/bin/sh\ncase "$1" in --version|-dump*) exec g++ "$@";; esac\necho "x.cpp:1: error: no thanks" >&2; exit 1'
    )
    fake.chmod(0o755)
    words = ("torch", "--model", micro_model, "--gpu", "cpu", "--artifacts", tmp_path / "store")
    line = one_line(
        call(*BUILD, *words, CXX=str(fake)), "The compiler failed on text_encoder", "To repeat it: sdxl-build torch"
    )
    log = Path(line.partition("The compiler's words: ")[2].split(" To repeat")[0].rstrip("."))
    assert "no thanks" in log.read_text()
    log.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc")
@pytest.mark.parametrize(
    ("words", "sign"),
    [
        (("torch", "--gpu", "cpu"), "inductor"),
        pytest.param(  # TensorRT has begun to build an engine
            ("trt", "--gpu", "sm86", "--no-golden", "--jobs", "1"), "*.progress", marks=NEEDS_RTX
        ),
    ],
)
def test_ctrl_c_ends_a_build_and_its_compilers(
    words: tuple[str, ...], sign: str, micro_model: Path, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    words = (*BUILD, *words, "--model", str(micro_model), "--artifacts", str(root))
    build = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TEST_OF_CTRL_C": str(root)},
        # A test run that was started in the background ignores SIGINT, and would hand that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not list(root.glob(f"v1/staging/*/{sign}")) and build.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(root.glob(f"v1/staging/*/{sign}")), "no compiler has begun"
    assert len(_with_mark(str(root))) > 1
    build.send_signal(signal.SIGINT)
    out, err = build.communicate(timeout=60)
    # Python may end itself with SIGINT after all; a shell shows that as 130 too.
    assert build.returncode in (130, -signal.SIGINT)
    assert out == "" and err.strip() == "Interrupted; what was unfinished is removed."
    while _with_mark(str(root)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _with_mark(str(root)) == []
    assert list((root / "v1" / "staging").iterdir()) == []
    assert not list((root / "v1").glob("micro/*/*"))
    assert not list((root / "v1").glob("code/*"))


def _with_mark(mark: str) -> list[int]:
    """Processes that descend from one that was given this mark in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if f"TEST_OF_CTRL_C={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


# Lines of JSON on stdin


@pytest.mark.slow
def test_a_wrong_line_of_stdin_is_answered_and_the_next_one_runs(micro_artifact: Path, tmp_path: Path) -> None:
    lines = ['{"prompt": "x", "width": 65}', "no json", '{"prompt": "x", "out": "' + str(tmp_path / "a.png") + '"}']
    words = ("--engine", micro_artifact, "--prompts", "-", "--steps", "1", "--seed", "1")
    done = subprocess.run([*RUN, *map(str, words)], input="\n".join(lines), capture_output=True, text=True)
    first, second, third = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0
    assert "multiples of 8" in first["error"] and "not valid JSON" in second["error"]
    assert third["line"] == 3 and third["images"][0]["seed"] == 1 and (tmp_path / "a.png").is_file()
