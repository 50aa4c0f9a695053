"""A stand-in artifact and a stand-in pipeline: what the command line needs, and no engine."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from buildtool.store import manifest as manifests
from buildtool.store.key import KEY_VERSION, ArtifactKey
from buildtool.store.manifest import Check, Component, FileEntry, Manifest, PipelineConfig, Variant


def stand_in_manifest(
    width=64,
    height=64,
    batch=1,
    model="tiny",
    scheduler=None,
    code=b"code",
    encoder=False,
    options=None,
    refiner=False,
) -> Manifest:
    key = ArtifactKey(
        key_version=KEY_VERSION,
        backend="torch",
        model=model,
        revision="",
        variant="",
        weights={"unet": "0" * 64},
        configs={"scheduler": scheduler or {}, **({"text_encoder_2": {}} if refiner else {})},
        tokenizers={},
        target="cpu-avx2",
        gpu_name="any",
        width=width,
        height=height,
        batch=batch,
        precision="fp32",
        vae="default",
        options=options or {},
        toolchain={"torch": "2.13.0"},
    )
    check = Check(status="passed", error={"sample": 0.0}, tolerance=1e-4, reason="")
    unet = Component(
        loader="torch",
        precision="fp32",
        code_key="1" * 64,
        weights="",
        tensors={},
        variants={"cfg": Variant(file="unet.cfg.pt2", inputs=(), outputs=(), constants={}, check=check)},
    )
    return manifests.seal(
        Manifest(
            schema_version=manifests.SCHEMA_VERSION,
            key=key,
            key_digest=key.digest,
            created="2026-01-01T00:00:00Z",
            command=("sdxl-build", "torch", "--model", "tiny", "--resolution", f"{width}x{height}", "--gpu", "cpu"),
            built_with={},
            build_seconds={},
            pipeline=PipelineConfig(
                force_zeros_for_empty_prompt=True,
                latent_channels=4,
                vae_scale_factor=8,
                scaling_factor=0.13025,
                latents_mean=None,
                latents_std=None,
                max_prompt_tokens=77,
            ),
            components={"unet": unet, **({"vae_encoder": unet} if encoder else {})},
            files={"unet.cfg.pt2": FileEntry(size=len(code), sha256=hashlib.sha256(code).hexdigest())},
            digest="",
        )
    )


def stand_in_artifact(folder: Path, **settings) -> Path:
    folder.mkdir(parents=True)
    (folder / "unet.cfg.pt2").write_bytes(settings.get("code", b"code"))
    (folder / "manifest.json").write_bytes(manifests.encode(stand_in_manifest(**settings)))
    return folder


class StandInPipeline:
    """Takes the calls of ``runtimes.pipeline.Pipeline``; a picture is one colour, drawn by its generator."""

    loads = 0
    memory = "resident"
    device = torch.device("cpu")

    def __init__(self, folders):
        read = [manifests.read(folder) for folder in folders]
        self._manifests = {(m.key.width, m.key.height): m for m in read}
        self.calls = []
        self.timings = {}
        self.unet_steps = {}
        self.before_call = lambda number: None

    @property
    def sizes(self):
        return list(self._manifests)

    def manifest(self, width, height):
        return self._manifests[width, height]

    def __call__(self, prompt, *, width, height, num_inference_steps, generator, progress, **rest):
        self.before_call(len(self.calls))
        self.calls.append(
            {"prompt": prompt, "width": width, "height": height, "steps": num_inference_steps, **rest}
            | {"seeds": [each.initial_seed() for each in generator]}
        )
        assert all(each.device.type == "cpu" for each in generator)
        assert len(generator) == len(prompt) <= self.manifest(width, height).key.batch
        if progress:
            for done in range(num_inference_steps):
                progress(done + 1, num_inference_steps)
        self.timings = {"encode": 0.1, "denoise": 0.5, "decode": 0.2}
        self.unet_steps = {"full": num_inference_steps, "shallow": 0}
        colours = [tuple(torch.randint(256, (3,), generator=each).tolist()) for each in generator]
        return SimpleNamespace(images=[Image.new("RGB", (width, height), colour) for colour in colours])
