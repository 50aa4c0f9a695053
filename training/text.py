"""A head start for the text encoders: say from their states what stands where.

Nine learned queries, one for each place, read the encoders' penultimate states as the UNet's cross-attention will; the
pooled vector has to know the background. The heads are thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training import world
from training.architecture import TEXT_WIDTH, TEXT_WIDTH_2, Parts
from training.data import Captions, Words, loader
from training.learner import Inputs, Learner, seeded_steps
from training.logbook import Logbook
from training.plan import Plan

CLASSES = (len(world.SHAPES) + 1, len(world.COLOURS) + 1, len(world.SIZES) + 1, len(world.TEXTURES) + 1, 5)


def encode_text(encoders: Mapping[str, Any], ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
    """States [n, 77, 288] and pooled [n, 160], as SDXL's pipeline takes them: penultimate layers, projected end."""
    first = encoders["text_encoder"](ids, output_hidden_states=True)
    second = encoders["text_encoder_2"](ids_2, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


class Heads(nn.Module):
    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, len(world.PLACES), width))
        # Two heads' worth of readers: one attention for each encoder's states, so that both learn all of it.
        self.read = nn.ModuleList(
            nn.MultiheadAttention(width, 4, kdim=states, vdim=states, batch_first=True)
            for states in (TEXT_WIDTH, TEXT_WIDTH_2)
        )
        self.say = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, sum(CLASSES))
            )
            for _ in range(2)
        )
        self.behind = nn.Linear(TEXT_WIDTH_2, len(world.BACKGROUNDS))

    def forward(self, states: Tensor, pooled: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of places of which everything is right."""
        queries = self.places.expand(len(states), -1, -1)
        loss = functional.cross_entropy(self.behind(pooled).float(), targets[:, -1, 0])
        right = torch.ones_like(targets[:, :-1, 0], dtype=torch.bool)
        for part, read, say in zip(
            torch.split(states, [TEXT_WIDTH, TEXT_WIDTH_2], dim=-1), self.read, self.say, strict=True
        ):
            found = say(queries + read(queries, part, part, need_weights=False)[0])
            for number, logits in enumerate(torch.split(found, list(CLASSES), dim=-1)):
                wanted = targets[:, :-1, number]
                loss = loss + functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
                right = right & (logits.argmax(-1) == wanted)
        return loss, right.all(1).float().mean()


def pretrain_text(parts: Parts, plan: Plan, out: Path, log: Logbook, device: torch.device) -> None:
    torch.manual_seed(plan.seed + 3)
    modules = {
        "text_encoder": parts.text_encoder,
        "text_encoder_2": parts.text_encoder_2,
        "heads": Heads().to(device),
    }
    right = torch.zeros((), device=device)

    def loss_of(live: dict[str, Any], inputs: Inputs) -> Tensor:
        states, pooled = encode_text(live, inputs["ids"], inputs["ids_2"])
        loss, share = live["heads"](states, pooled, inputs["targets"])
        right.copy_(share)
        return loss  # type: ignore[no-any-return]

    rates = dict.fromkeys(modules, plan.text_lr)
    learner = Learner("text", modules, rates, loss_of, plan.text_steps, plan, out, device)
    if not learner.done:
        captions = Captions(
            out / "model",
            plan.seed + 2,
            10 * plan.pool,
            plan.text_batch,
            range(learner.start, plan.text_steps),
            complete=True,
        )
        words: Words
        for step, words in zip(seeded_steps(learner, plan.seed + 3), loader(captions, plan.workers), strict=True):
            loss = learner(
                step,
                {
                    "ids": words.ids.to(device),
                    "ids_2": words.ids_2.to(device),
                    "targets": words.targets.to(device),
                },
            )
            if (step + 1) % plan.log_every == 0:
                log.write("text", step=step + 1, loss=loss.item(), right=right.item())
    learner.finish()
