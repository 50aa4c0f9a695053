"""The UNet with its text encoders, and the refiner's UNet: noise prediction on latents of drawn scenes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.architecture import SCHEDULER, Parts
from training.data import BUCKETS, Captions, Scenes, Words, draw, load_tokenizer, loader, numbers_of
from training.learner import Inputs, Learner, seeded_steps
from training.logbook import Logbook
from training.plan import Plan
from training.scoring import diffusers_draw, held_out_prompts, score
from training.text import encode_text

DROP_PROMPT = 0.08  # to zeros, which is what the pipeline takes for no prompt
EMPTY_PROMPT = 0.03  # to the encoded empty text, which is what an empty negative prompt is
OFFSET_NOISE = 0.06  # noise shared by a whole channel, so that the model doesn't read brightness off the noise's mean
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023)
REFINER_STEPS = 300  # the refiner knows the noise levels below this timestep


class Latents:
    """The pool: scaled latents of every example, bfloat16 or float32, on the device."""

    def __init__(self, parts: Parts, plan: Plan, count: int, seed: int, device: torch.device, spoil: bool) -> None:
        vae = copy.deepcopy(parts.vae).eval()
        if plan.bf16:
            vae = vae.bfloat16()
        scale = float(vae.config.scaling_factor)
        self.index = torch.full((count,), -1, dtype=torch.int64)
        for numbers in numbers_of(count):
            self.index[numbers] = torch.arange(len(numbers))
        self.index = self.index.to(device)
        found: list[list[Tensor]] = [[] for _ in BUCKETS]
        for bucket, examples in loader(Scenes(seed, count, plan.encode_batch, spoil), plan.workers):
            pictures = draw(examples, bucket, device).to(vae.dtype)
            with torch.no_grad():
                found[bucket].append(vae.encode(pictures).latent_dist.mean * scale)
        self.pools = [torch.cat(part) for part in found]

    def __call__(self, bucket: int, numbers: Tensor) -> Tensor:
        return self.pools[bucket][self.index[numbers]].float()


def noise_table(device: torch.device) -> Tensor:
    """The cumulative alphas of the schedule, float32 [1000]."""
    betas = torch.linspace(SCHEDULER["beta_start"] ** 0.5, SCHEDULER["beta_end"] ** 0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).float().to(device)


def denoising_loss(
    unet: Callable[..., Any],
    latents: Tensor,
    timesteps: Tensor,
    alphas: Tensor,
    states: Tensor,
    added: dict[str, Tensor],
) -> Tensor:
    """Min-SNR weighted error of the predicted noise, mean over the batch."""
    noise = torch.randn_like(latents)
    noise = noise + OFFSET_NOISE * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    found = unet(noisy.to(states.dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
    snr = (alpha / (1 - alpha)).flatten()
    weight = snr.clamp(max=SNR_CAP) / snr
    error: Tensor = (found.float() - noise).square().mean((1, 2, 3))
    return (error * weight).mean()


def train_unet(parts: Parts, plan: Plan, out: Path, log: Logbook, device: torch.device) -> None:
    """The UNet and both text encoders, on the pool of drawn scenes."""
    alphas = noise_table(device)

    def loss_of(live: dict[str, Any], inputs: Inputs) -> Tensor:
        latents = inputs["latents"]
        count = len(latents)
        # Three in ten lean to high noise, where layouts are decided.
        share = torch.rand(count, device=device)
        share = torch.where(torch.rand(count, device=device) < 0.3, share.sqrt(), share)
        timesteps = (share * 1000).long().clamp(max=999)
        states, pooled = encode_text(live, inputs["ids"], inputs["ids_2"])
        kept = (torch.rand(count, device=device) >= DROP_PROMPT).to(states.dtype)
        states, pooled = states * kept.view(-1, 1, 1), pooled * kept.view(-1, 1)
        added = {"text_embeds": pooled, "time_ids": inputs["sizes"]}
        return denoising_loss(live["unet"], latents, timesteps, alphas, states, added)

    modules = {"unet": parts.unet, "text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
    rates = {"unet": plan.unet_lr, "text_encoder": plan.unet_text_lr, "text_encoder_2": plan.unet_text_lr}
    learner = Learner("unet", modules, rates, loss_of, plan.unet_steps, plan, out, device)
    if not learner.done:
        pool = Latents(parts, plan, plan.pool, plan.seed + 2, device, spoil=False)
        log.write("unet", pool=plan.pool)
        left = range(learner.start, plan.unet_steps)
        captions = Captions(out / "model", plan.seed + 2, plan.pool, plan.unet_batch, left, empty=EMPTY_PROMPT)
        total = torch.zeros((), device=device)
        words: Words
        for step, words in zip(seeded_steps(learner, plan.seed + 5), loader(captions, plan.workers), strict=True):
            total += learner(
                step,
                {
                    "latents": pool(words.bucket, words.numbers.to(device)),
                    "ids": words.ids.to(device),
                    "ids_2": words.ids_2.to(device),
                    "sizes": words.sizes[:, :6].to(device),
                },
            )
            if (step + 1) % plan.log_every == 0:
                log.write("unet", step=step + 1, loss=total.item() / plan.log_every)
                total.zero_()
            if (step + 1) % plan.sheet_every == 0 or step + 1 == plan.unet_steps:
                sample(parts, learner.average, plan, step + 1, out, log)
    learner.finish()


def sample(
    parts: Parts, average: dict[str, nn.Module], plan: Plan, step: int, out: Path, log: Logbook, steps: int = 20
) -> float:
    """A sheet of held-out prompts drawn by the averaged weights, and the share of them that is right."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    from training.judge import shares
    from training.sheet import write_sheet

    pipeline = StableDiffusionXLPipeline(
        vae=parts.vae,
        unet=average["unet"].eval(),
        text_encoder=average["text_encoder"].eval(),
        text_encoder_2=average["text_encoder_2"].eval(),
        tokenizer=load_tokenizer(out / "model"),
        tokenizer_2=CLIPTokenizer.from_pretrained(out / "model" / "tokenizer_2"),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[Any] = []
    plain = diffusers_draw(pipeline, steps=min(steps, plan.unet_steps), guidance=5.0)

    def draw_and_keep(prompts: list[str], seeds: list[int]) -> Any:
        found = plain(prompts, seeds)
        pictures.extend(found)
        return found

    prompts = held_out_prompts(plan.score_prompts, seed=1)
    verdicts = score(draw_and_keep, prompts, batch=64)
    write_sheet(
        torch.stack([torch.tensor(picture) for picture in pictures[:32]]), out / "sheets" / f"unet-{step:06d}.png"
    )
    (out / "sheets" / "unet-prompts.txt").write_text("\n".join(prompts[:32]) + "\n")
    table = shares(verdicts)
    log.write("unet", step=step, **table)
    return table["right"]


def train_refiner(parts: Parts, plan: Plan, out: Path, log: Logbook, device: torch.device) -> None:
    """The refiner: low noise only, conditioned on the second text encoder (frozen) and an aesthetic score."""
    alphas = noise_table(device)
    encoder = copy.deepcopy(parts.text_encoder_2).eval().requires_grad_(False)
    if plan.bf16:
        encoder = encoder.bfloat16()

    def loss_of(live: dict[str, Any], inputs: Inputs) -> Tensor:
        latents = inputs["latents"]
        timesteps = torch.randint(0, REFINER_STEPS, (len(latents),), device=device)
        with torch.no_grad():
            found = encoder(inputs["ids_2"], output_hidden_states=True)
        added = {"text_embeds": found.text_embeds, "time_ids": inputs["sizes"]}
        return denoising_loss(live["unet"], latents, timesteps, alphas, found.hidden_states[-2], added)

    rates = {"unet": plan.refiner_lr}
    learner = Learner("refiner", {"unet": parts.refiner}, rates, loss_of, plan.refiner_steps, plan, out, device)
    if not learner.done:
        pool = Latents(parts, plan, plan.refiner_pool, plan.seed + 2, device, spoil=True)
        captions = Captions(
            out / "model",
            plan.seed + 2,
            plan.refiner_pool,
            plan.refiner_batch,
            range(learner.start, plan.refiner_steps),
            empty=DROP_PROMPT,
            spoil=True,
        )
        words: Words
        for step, words in zip(seeded_steps(learner, plan.seed + 6), loader(captions, plan.workers), strict=True):
            loss = learner(
                step,
                {
                    "latents": pool(words.bucket, words.numbers.to(device)),
                    "ids_2": words.ids_2.to(device),
                    "sizes": words.sizes[:, [0, 1, 2, 3, 6]].to(device),
                },
            )
            if (step + 1) % plan.log_every == 0:
                log.write("refiner", step=step + 1, loss=loss.item())
    learner.finish()
