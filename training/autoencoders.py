"""The VAE, and the small autoencoder that stands in for it (`--vae tiny`)."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.architecture import Parts
from training.data import BUCKETS, Scenes, bucket_of, draw, loader
from training.learner import Inputs, Learner, seeded_steps
from training.logbook import Logbook
from training.plan import Plan
from training.render import to_uint8
from training.sheet import write_sheet

KL_WEIGHT = 5e-3


class Pictures:
    """Pictures on the device, drawn when the first is asked for."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device

    @functools.cached_property
    def pools(self) -> list[Tensor]:
        """uint8 [n, 3, h, w] a bucket."""
        parts: list[list[Tensor]] = [[] for _ in BUCKETS]
        for bucket, examples in loader(Scenes(self.plan.seed + 1, self.plan.pictures, 250), self.plan.workers):
            parts[bucket].append(((draw(examples, bucket, self.device) + 1) * 127.5).round().to(torch.uint8))
        return [torch.cat(part) for part in parts]

    def batch(self, step: int, size: int, crop: int | None) -> Tensor:
        """Float [size, 3, h, w] in -1..1; the same for the same step."""
        generator = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + step)
        pool = self.pools[bucket_of(step)]
        index = torch.randint(len(pool), (size,), generator=generator)
        found = pool[index.to(self.device)]
        if crop:
            rows, columns = found.shape[2], found.shape[3]
            top = int(torch.randint(rows - crop + 1, (1,), generator=generator))
            left = int(torch.randint(columns - crop + 1, (1,), generator=generator))
            found = found[:, :, top : top + crop, left : left + crop]
        return found.float() / 127.5 - 1


def distance(drawn: Tensor, wanted: Tensor) -> Tensor:
    """L1 of pixels, of edges, and of the picture at a quarter of its size, and squares. Means over everything.

    The squares matter in the beginning: a missing shape is a few pixels that are far off.
    """
    loss = functional.l1_loss(drawn, wanted) + 2 * functional.mse_loss(drawn, wanted)
    for axis in (2, 3):
        loss = loss + 0.5 * functional.l1_loss(drawn.diff(dim=axis), wanted.diff(dim=axis))
    return loss + 0.5 * functional.l1_loss(functional.avg_pool2d(drawn, 4), functional.avg_pool2d(wanted, 4))


def train_vae(parts: Parts, plan: Plan, pictures: Pictures, out: Path, log: Logbook, device: torch.device) -> None:
    """Train `parts.vae` and set its `scaling_factor` so that its latents have unit deviation."""
    vae = parts.vae

    def loss_of(live: dict[str, Any], inputs: Inputs) -> Tensor:
        wanted = inputs["pictures"]
        posterior = live["vae"].encode(wanted.to(live["vae"].dtype)).latent_dist
        drawn = live["vae"].decode(posterior.sample()).sample.float()
        mean, variance = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + variance.exp() - 1 - variance).sum() / wanted.numel()
        loss: Tensor = distance(drawn, wanted) + KL_WEIGHT * kl
        return loss

    learner = Learner("vae", {"vae": vae}, {"vae": plan.vae_lr}, loss_of, plan.vae_steps, plan, out, device)

    def batch(step: int) -> Tensor:
        # Crops first, whole pictures in the end: the middle block's attention has to know its real size.
        if step < 0.7 * plan.vae_steps:
            return pictures.batch(step, plan.vae_batch, 128)
        return pictures.batch(step, max(1, plan.vae_batch // 4), None)

    measured = out / "checkpoints" / "scaling_factor.json"
    _fit(learner, batch, log, plan)
    if not measured.exists():
        wanted = pictures.batch(2, plan.shown_pictures, None)
        with torch.no_grad():
            latents = vae.encode(wanted).latent_dist.mean
            drawn = vae.decode(latents).sample
        _show("vae", plan.vae_steps, wanted, drawn, out, log)
        log.write("vae", latent_mean=latents.mean().item(), latent_std=latents.std().item())
        measured.write_text(json.dumps(round(1 / latents.std().item(), 5)))
    vae.register_to_config(scaling_factor=json.loads(measured.read_text()))


def train_vae_tiny(parts: Parts, plan: Plan, pictures: Pictures, out: Path, log: Logbook, device: torch.device) -> None:
    """Distil `parts.vae` into `parts.vae_tiny`, whose latents are the VAE's times its `scaling_factor`."""
    vae, tiny = parts.vae.eval(), parts.vae_tiny
    teacher = copy.deepcopy(vae).bfloat16() if plan.bf16 else vae
    scale = float(vae.config.scaling_factor)

    def loss_of(live: dict[str, Any], inputs: Inputs) -> Tensor:
        wanted = inputs["pictures"]
        low = wanted.to(teacher.dtype)
        with torch.no_grad():
            latents = teacher.encode(low).latent_dist.mean * scale
        found = live["vae_tiny"].encode(low).latents
        drawn = live["vae_tiny"].decode(latents).sample.float()
        return distance(drawn, wanted) + functional.mse_loss(found.float(), latents.float())

    rates = {"vae_tiny": plan.vae_tiny_lr}
    learner = Learner("vae_tiny", {"vae_tiny": tiny}, rates, loss_of, plan.vae_tiny_steps, plan, out, device)

    _fit(learner, lambda step: pictures.batch(step, plan.vae_batch, 128), log, plan)
    if not learner.done:
        wanted = pictures.batch(2, plan.shown_pictures, None)
        with torch.no_grad():
            drawn = tiny.decode(vae.encode(wanted).latent_dist.mean * scale).sample
        _show("vae_tiny", plan.vae_tiny_steps, wanted, drawn, out, log)


def _show(stage: str, step: int, wanted: Tensor, drawn: Tensor, out: Path, log: Logbook) -> None:
    """The first eight pictures above what became of them, and the error over all."""
    log.write(stage, step=step, l1=functional.l1_loss(drawn, wanted).item())
    pairs = torch.cat([wanted[:8], drawn[:8]])
    write_sheet(to_uint8(pairs), out / "sheets" / f"{stage}-{step:05d}.png", columns=min(8, len(wanted)))


def _fit(learner: Learner, batch: Callable[[int], Tensor], log: Logbook, plan: Plan) -> None:
    for step in seeded_steps(learner, plan.seed + 4):
        loss = learner(step, {"pictures": batch(step)})
        if (step + 1) % plan.log_every == 0:
            log.write(learner.stage, step=step + 1, loss=loss.item())
    learner.finish()
