"""A stand-in for a real exporter: makes a few small files with pauses and commits them as a build does.

No torch, no model. Tests import it through the ``standin`` fixture, or run it to have something to kill::

    python standin_exporter.py ROOT --seed N --pause SECONDS --counter FILE --force
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from buildtool.store import manifest
from buildtool.store.key import KEY_VERSION, ArtifactKey, CodeKey
from buildtool.store.manifest import Check, Component, Manifest, PipelineConfig, StoredTensor, TensorSpec, Variant
from buildtool.store.store import Store, describe

CREATED = "2026-01-02T03:04:05Z"


def example_key(**changes: Any) -> ArtifactKey:
    fields: dict[str, Any] = {
        "key_version": KEY_VERSION,
        "backend": "torch",
        "model": "tiny",
        "revision": "",
        "variant": "",
        "weights": {"unet": "11" * 32, "vae": "22" * 32},
        "configs": {"unet": {"sample_size": 8, "down": {"layers": [1, 2]}}, "scheduler": {"steps_offset": 1}},
        "tokenizers": {"tokenizer": "33" * 32},
        "target": "cpu-avx2",
        "gpu_name": "any",
        "width": 64,
        "height": 64,
        "batch": 1,
        "precision": "fp32",
        "vae": "default",
        "options": {"fuse_qkv": True},
        "toolchain": {"torch": "2.13.0"},
    }
    return ArtifactKey(**{**fields, **changes})


def example_code_key(**changes: Any) -> CodeKey:
    fields: dict[str, Any] = {
        "key_version": KEY_VERSION,
        "backend": "torch",
        "component": "unet",
        "config": {"sample_size": 8, "down": {"layers": [1, 2]}},
        "target": "cpu-avx2",
        "gpu_name": "any",
        "width": 64,
        "height": 64,
        "batch": 1,
        "precision": "fp32",
        "options": {"fuse_qkv": True},
        "toolchain": {"torch": "2.13.0"},
    }
    return CodeKey(**{**fields, **changes})


def example_manifest(key: ArtifactKey, listed: dict[str, manifest.FileEntry], **changes: Any) -> Manifest:
    """A valid manifest of one component, ``unet``, with one variant, ``cfg``."""
    latents = TensorSpec(name="sample", shape=(2, 4, 8, 8), dtype="float32", stride=(256, 64, 8, 1))
    check = Check(status="passed", error={"sample": 1e-6}, tolerance=1e-4, reason="")
    variant = Variant(
        file="unet.cfg.pt2", inputs=(latents,), outputs=(latents,), constants={"w": "conv.weight"}, check=check
    )
    stored = StoredTensor(shape=(16,), dtype="float32", stride=(1,), sources=("conv.weight",))
    unet = Component(
        loader="torch_package",
        precision="fp32",
        code_key=example_code_key(width=key.width).digest,
        weights="weights/unet.safetensors",
        tensors={"conv.weight": stored},
        variants={"cfg": variant},
    )
    fields: dict[str, Any] = {
        "schema_version": manifest.SCHEMA_VERSION,
        "key": key,
        "key_digest": key.digest,
        "created": CREATED,
        "command": ("sdxl-build", "torch", "--model", key.model),
        "built_with": {"torch": "2.13.0"},
        "build_seconds": {"unet": 1.5},
        "pipeline": PipelineConfig(
            force_zeros_for_empty_prompt=True,
            latent_channels=4,
            vae_scale_factor=8,
            scaling_factor=0.13025,
            latents_mean=None,
            latents_std=None,
            max_prompt_tokens=77,
        ),
        "components": {"unet": unet},
        "files": listed,
        "digest": "",
    }
    return Manifest(**{**fields, **changes})


class StandInExporter:
    """Builds as the real thing does: lock, look up again, code, weights, manifest, commit.

    Args:
        pause: seconds between one small write and the next.
        counter: a file that gets one byte for each compile.
        size: bytes of the weights file.
    """

    def __init__(self, store: Store, pause: float = 0.0, counter: Path | None = None, size: int = 64_000) -> None:
        self.store = store
        self.pause = pause
        self.counter = counter
        self.size = size

    def build(
        self,
        key: ArtifactKey,
        force: bool = False,
        message: Callable[[str], None] | None = None,
        **changes: Any,
    ) -> Path:
        """The key's artifact; ``changes`` go into the manifest."""
        with self.store.building(key.digest, message):
            hit = None if force else self.store.lookup(key)
            if hit is not None:
                return hit
            with self.store.stage() as stage:
                self._code(key)
                self.store.attach_code(example_code_key(width=key.width).digest, stage)
                self._write(stage / "weights.new", key.weights["unet"].encode(), self.size)
                digest = self.store.add_blob(stage / "weights.new")
                self._rest()
                self.store.link(self.store.blob(digest), stage / "weights/unet.safetensors")
                self._write(stage / "golden.safetensors", b"golden", 3000)
                sealed = example_manifest(key, describe(stage, {"weights/unet.safetensors": digest}), **changes)
                (stage / manifest.MANIFEST).write_bytes(manifest.encode(sealed))
                self._rest()
                return self.store.commit(stage, key)

    def _code(self, key: ArtifactKey) -> None:
        code_key = example_code_key(width=key.width)
        with self.store.building(code_key.digest):
            if self.store.code(code_key.digest) is not None:
                return
            if self.counter is not None:
                with open(self.counter, "ab") as file:
                    file.write(b"+")
            with self.store.stage() as stage:
                self._write(stage / "unet.cfg.pt2", b"code", 20_000)
                self.store.commit_code(stage, code_key.digest, {"constants": {"w": "conv.weight"}})

    def _write(self, path: Path, seed: bytes, size: int) -> None:
        data = random.Random(seed).randbytes(size)
        with open(path, "wb") as file:
            for start in range(0, size, size // 4):
                file.write(data[start : start + size // 4])
                file.flush()
                self._rest()

    def _rest(self) -> None:
        if self.pause:
            time.sleep(self.pause)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--counter", type=Path)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--created", default=CREATED)
    options = parser.parse_args()
    exporter = StandInExporter(Store(options.root), options.pause, options.counter)
    print("ready", flush=True)
    key = example_key(width=options.width)
    tell = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    print(exporter.build(key, options.force, tell, created=options.created), flush=True)


if __name__ == "__main__":
    main()
