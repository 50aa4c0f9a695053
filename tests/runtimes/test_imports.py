"""What an artifact's run imports: everything it doesn't is time that a cold start saves."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WATCHED = """
import json, runpy, sys
sys.argv[0] = "sdxl-run"
try:
    runpy.run_module("runtimes.cli", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported(artifact: Path, out: Path, packages: Path = ROOT, blocked: str = "") -> set[str]:
    """The modules in memory after ``sdxl-run`` made a picture; ``blocked`` is code that goes first."""
    words = ["--engine", str(artifact), "--prompt", "a red circle", "--steps", "2", "--seed", "1", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", blocked + WATCHED, *words, "--guidance-until", "0.4", "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=packages,  # with -c, modules are looked for here first
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    assert done.returncode == 0, done.stderr
    assert out.is_file()
    return set(json.loads(done.stderr.splitlines()[-1]))


def below(modules: set[str], *packages: str) -> list[str]:
    return sorted(m for m in modules if any(m == p or m.startswith(f"{p}.") for p in packages))


@pytest.mark.slow
def test_a_run_imports_no_model_library_and_no_compiler(micro_artifact: Path, tmp_path: Path) -> None:
    modules = imported(micro_artifact, tmp_path / "picture.png")
    assert "torch" in modules and "runtimes.torch_package" in modules
    assert below(modules, "diffusers", "transformers", "huggingface_hub", "accelerate", "exporters") == []
    # torch._inductor.aoti_load_package would bring both, and seconds with them.
    assert below(modules, "torch._inductor", "torch._dynamo", "sympy", "triton") == []
    assert [m for m in below(modules, "buildtool") if not m.startswith("buildtool.store")] == ["buildtool"]


@pytest.mark.slow
def test_runtimes_and_the_store_are_enough(micro_artifact: Path, tmp_path: Path) -> None:
    """As if only they were installed: the rest of the project is not there, and model libraries can't be imported."""
    alone = tmp_path / "alone"
    shutil.copytree(ROOT / "runtimes", alone / "runtimes")
    shutil.copytree(ROOT / "buildtool" / "store", alone / "buildtool" / "store")
    shutil.copy(ROOT / "buildtool" / "__init__.py", alone / "buildtool")
    blocked = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'huggingface_hub', 'exporters', 'accelerate', 'rich'):\n"
        "    sys.modules[name] = None\n"
    )
    modules = imported(micro_artifact, tmp_path / "picture.png", alone, blocked)
    assert "runtimes.session" in modules


def test_help_and_wrong_options_import_no_torch() -> None:
    script = (
        "import sys, runtimes.cli\n"
        "try: runtimes.cli.main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules, file=sys.stderr)"
    )
    for words, code in ((["--help"], 0), (["--engine", "nowhere", "--prompt", "x"], 1), (["--engine", "x"], 2)):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=ROOT)
        assert done.stderr.splitlines()[-1] in (f"{code} False", f"{code or None} False"), done.stderr
