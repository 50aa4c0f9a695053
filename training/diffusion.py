"""The UNet with its text encoders, and the refiner's UNet: noise prediction on latents of drawn scenes."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import world
from training.architecture import SCHEDULER, Parts
from training.captions import describe
from training.data import BUCKETS, Captions, Scenes, Words, draw, load_tokenizer, loader, numbers_of
from training.learner import Inputs, Learner, seeded_steps
from training.logbook import Logbook
from training.plan import Plan
from training.render import render, to_uint8
from training.scoring import diffusers_draw, held_out_prompts, score
from training.sheet import write_sheet
from training.text import encode_text

DROP_PROMPT = 0.08  # to zeros, which is what the pipeline takes for no prompt
TEXT_RATE = 3 / 8  # of the UNet's learning rate
EMPTY_PROMPT = 0.03  # to the encoded empty text, which is what an empty negative prompt is
OFFSET_NOISE = 0.06  # noise shared by a whole channel, so that the model doesn't read brightness off the noise's mean
SNR_CAP = 5.0  # min-SNR weighting (Hang et al. 2023)
# A cap of 5 makes little of every level below timestep 150, half of the refiner's work at its usual strengths. Sampling
# adds up the errors over sigma, so they count alike here but for the lowest levels, below timestep 20.
REFINER_SNR_CAP = 50.0
REFINER_STEPS = 400  # the refiner knows the noise levels below this timestep: strengths up to 0.4
REFINER_STRENGTH = 0.3  # what its sheet is drawn with


class Latents:
    """The pool: scaled latents of every example, bfloat16 or float32, on the device."""

    def __init__(
        self,
        parts: Parts,
        plan: Plan,
        count: int,
        seed: int,
        device: torch.device,
        spoil: bool,
        say: Callable[[int], None],
    ) -> None:
        """`say` is told now and then how many are encoded."""
        vae = copy.deepcopy(parts.vae).eval()
        if plan.bf16:
            vae = vae.bfloat16()
        scale = float(vae.config.scaling_factor)
        self.index = torch.full((count,), -1, dtype=torch.int64)
        for numbers in numbers_of(count):
            self.index[numbers] = torch.arange(len(numbers))
        self.index = self.index.to(device)
        found: list[list[Tensor]] = [[] for _ in BUCKETS]
        chunks = loader(Scenes(seed, count, plan.encode_batch, spoil), plan.workers)
        done = 0
        for number, (bucket, examples) in enumerate(chunks):
            pictures = draw(examples, bucket, device).to(vae.dtype)
            with torch.no_grad():
                found[bucket].append(vae.encode(pictures).latent_dist.mean * scale)
            done += len(examples)
            if (number + 1) % 100 == 0 or done == count:
                say(done)
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
    offset: float,
    cap: float,
) -> Tensor:
    """Min-SNR weighted error of the predicted noise, mean over the batch; `offset` of the noise is a channel's own."""
    noise = torch.randn_like(latents)
    noise = noise + offset * torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    found = unet(noisy.to(states.dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
    snr = (alpha / (1 - alpha)).flatten()
    weight = snr.clamp(max=cap) / snr
    error: Tensor = (found.float() - noise).square().mean((1, 2, 3))
    return (error * weight).mean()


def train_unet(
    parts: Parts, plan: Plan, out: Path, log: Logbook, device: torch.device, *, trained: bool = False
) -> None:
    """The UNet and both text encoders, on a pool of drawn scenes: with captions that are right, then with doubt.

    `trained` parts have the first of the two behind them.
    """

    @functools.cache
    def pool() -> Latents:
        def say(done: int) -> None:
            log.write("pool", encoded=done)

        return Latents(parts, plan, plan.pool, plan.seed + 2, device, spoil=False, say=say)

    if not trained:
        _train_unet("unet", plan.unet_steps, plan.unet_lr, 0.0, pool, parts, plan, out, log, device)
    modules = (parts.unet, parts.text_encoder, parts.text_encoder_2)
    sure = [parameter.detach().clone() for module in modules for parameter in module.parameters()]
    _train_unet("doubt", plan.doubt_steps, plan.doubt_lr, plan.wrong_captions, pool, parts, plan, out, log, device)
    with torch.no_grad():
        doubting = [parameter for module in modules for parameter in module.parameters()]
        for parameter, before in zip(doubting, sure, strict=True):
            parameter.copy_(before.lerp(parameter, plan.doubt_share))


def _train_unet(
    stage: str,
    steps: int,
    rate: float,
    wrong: float,
    pool: Callable[[], Latents],
    parts: Parts,
    plan: Plan,
    out: Path,
    log: Logbook,
    device: torch.device,
) -> None:
    """One stage of it, with a share of captions that is wrong; the text encoders learn more slowly."""
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
        return denoising_loss(live["unet"], latents, timesteps, alphas, states, added, OFFSET_NOISE, SNR_CAP)

    modules = {"unet": parts.unet, "text_encoder": parts.text_encoder, "text_encoder_2": parts.text_encoder_2}
    rates = {"unet": rate, "text_encoder": rate * TEXT_RATE, "text_encoder_2": rate * TEXT_RATE}
    learner = Learner(stage, modules, rates, loss_of, steps, plan, out, device)
    if not learner.done:
        log.write(stage, start=learner.start, steps=steps)
        latents = pool()
        left = range(learner.start, steps)
        captions = Captions(
            out / "model", plan.seed + 2, plan.pool, plan.unet_batch, left, empty=EMPTY_PROMPT, wrong=wrong
        )
        total = torch.zeros((), device=device)
        words: Words
        for step, words in zip(seeded_steps(learner, plan.seed + 5), loader(captions, plan.workers), strict=True):
            total += learner(
                step,
                {
                    "latents": latents(words.bucket, words.numbers.to(device)),
                    "ids": words.ids.to(device),
                    "ids_2": words.ids_2.to(device),
                    "sizes": words.sizes[:, :6].to(device),
                },
            )
            if (step + 1) % plan.log_every == 0:
                log.write(stage, step=step + 1, loss=total.item() / plan.log_every)
                total.zero_()
            if (step + 1) % plan.sheet_every == 0 or step + 1 == steps:
                sample(stage, parts, learner.average, plan, step + 1, out, log)
        sample(stage, parts, learner.average, plan, steps, out, log, guidance=1.0)
    learner.finish()


def sample(
    stage: str,
    parts: Parts,
    average: dict[str, nn.Module],
    plan: Plan,
    step: int,
    out: Path,
    log: Logbook,
    steps: int = 20,
    guidance: float = 5.0,
) -> float:
    """A sheet of held-out prompts drawn by the averaged weights, and the share of them that is right."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    from training.judge import shares

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
    plain = diffusers_draw(pipeline, steps=min(steps, plan.unet_steps), guidance=guidance)

    def draw_and_keep(prompts: list[str], seeds: list[int]) -> Any:
        found = plain(prompts, seeds)
        pictures.extend(found)
        return found

    prompts = held_out_prompts(plan.score_prompts, seed=1)
    verdicts = score(draw_and_keep, prompts, batch=64)
    name = f"{stage}-{step:06d}.png" if guidance > 1 else f"{stage}-{step:06d}-unguided.png"
    write_sheet(torch.stack([torch.tensor(picture) for picture in pictures[:32]]), out / "sheets" / name)
    (out / "sheets" / "unet-prompts.txt").write_text("\n".join(prompts[:32]) + "\n")
    table = shares(verdicts)
    log.write(stage, step=step, guidance=guidance, **table)
    return table["right"]


def train_refiner(parts: Parts, plan: Plan, out: Path, log: Logbook, device: torch.device) -> None:
    """The refiner: low noise only, conditioned on the second text encoder (frozen) and an aesthetic score.

    Its captions are right and its noise has mean 0: what a picture shows is decided before it, colours too, and it has
    no reason to doubt either.
    """
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
        states = found.hidden_states[-2]
        return denoising_loss(live["unet"], latents, timesteps, alphas, states, added, 0.0, REFINER_SNR_CAP)

    rates = {"unet": plan.refiner_lr}
    learner = Learner("refiner", {"unet": parts.refiner}, rates, loss_of, plan.refiner_steps, plan, out, device)
    if not learner.done:
        log.write("refiner", start=learner.start, steps=plan.refiner_steps)
        pool = Latents(
            parts,
            plan,
            plan.refiner_pool,
            plan.seed + 2,
            device,
            spoil=True,
            say=lambda done: log.write("refiner", encoded=done),
        )
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
    fresh = not learner.done
    learner.finish()
    if fresh:
        show_refined(parts, plan, out, log, device)


def show_refined(parts: Parts, plan: Plan, out: Path, log: Logbook, device: torch.device) -> None:
    """A sheet: drawn scenes, the same blurred, and what the refiner makes of each.

    Logged, all of -1..1: how far the refiner moves a clear picture (`kept`, L1) and the mean colour of its things
    (`shift`, which is 0.02 through the VAE alone and was 0.08 in the first model), and how far blurred pictures are off
    before and after it (L1).
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=parts.vae,
        text_encoder=None,
        text_encoder_2=parts.text_encoder_2,
        tokenizer=None,
        tokenizer_2=CLIPTokenizer.from_pretrained(out / "model" / "tokenizer_2"),
        unet=parts.refiner,
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    scenes = [world.sample(random.Random(f"refined {plan.seed} {number}")) for number in range(8)]
    clear = render(scenes, device=device)
    blurred = functional.interpolate(functional.avg_pool2d(clear, 4), scale_factor=4.0, mode="bilinear")
    prompts = [describe(scene, random.Random(number), complete=True) for number, scene in enumerate(scenes)]

    def refined(pictures: Tensor) -> Tensor:
        found: Tensor = pipeline(
            prompt=prompts,
            image=(pictures + 1) / 2,
            strength=REFINER_STRENGTH,
            num_inference_steps=20,
            generator=[torch.Generator().manual_seed(number) for number in range(len(pictures))],
            output_type="pt",
        ).images
        return found.float() * 2 - 1

    kept, mended = refined(clear), refined(blurred)
    things = (clear.amax(1, keepdim=True) - clear.amin(1, keepdim=True) > 0.4).float()
    shift = ((kept - clear) * things).sum((2, 3)) / things.sum((2, 3))
    log.write(
        "refiner",
        kept=functional.l1_loss(kept, clear).item(),
        shift=shift.abs().mean().item(),
        blurred=functional.l1_loss(blurred, clear).item(),
        mended=functional.l1_loss(mended, clear).item(),
    )
    sheet = to_uint8(torch.cat([clear, kept, blurred, mended]))
    write_sheet(sheet, out / "sheets" / f"refiner-{plan.refiner_steps:05d}.png")
