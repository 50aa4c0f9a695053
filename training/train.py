"""Train the tiny model from nothing: `python -m training.train --out DIR`.

Stages, each of which a broken run skips once it is done and otherwise goes on with: the VAE, the small autoencoder, a
head start for the text encoders, the UNet together with them, the same with some captions wrong (`doubt`), the refiner.
`--from MODEL` takes a finished model instead of the stages before `doubt`. The finished model is `DIR/model`, losses
are in `DIR/log.jsonl`, pictures in `DIR/sheets`.
"""

from __future__ import annotations

import argparse
import random
import shutil
from dataclasses import fields, replace
from pathlib import Path

import torch

from training import architecture, tokens, world
from training.captions import describe
from training.logbook import Logbook
from training.plan import SMOKE, Plan


def corpus(count: int = 20_000) -> list[str]:
    """Captions for the tokenizers."""
    found = []
    for number in range(count):
        rng = random.Random(f"corpus {number}")
        found.append(describe(world.sample(rng), rng))
    return found


def train(out: Path, plan: Plan, device: torch.device, begin: Path | None = None) -> Path:
    """Run what isn't done of every stage, or, on the model `begin`, of those from doubt on; returns the model."""
    from training import autoencoders, diffusion, text

    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    log = Logbook(out)
    model = out / "model"
    parts = architecture.build(plan.seed)
    if begin is None:
        if not (model / "tokenizer_2" / "vocab.json").exists():
            tokens.write(model, *tokens.train(corpus()))
        parts.to(device)
        pictures = autoencoders.Pictures(plan, device)
        autoencoders.train_vae(parts, plan, pictures, out, log, device)
        autoencoders.train_vae_tiny(parts, plan, pictures, out, log, device)
        del pictures
        text.pretrain_text(parts, plan, out, log, device)
    else:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(begin / name, model / name, dirs_exist_ok=True)
        architecture.load(parts, begin)
        parts.to(device)
    diffusion.train_unet(parts, plan, out, log, device, trained=begin is not None)
    architecture.save(parts, model)  # all but the refiner is finished: what a run that ends here is good for
    diffusion.train_refiner(parts, plan, out, log, device)
    architecture.save(parts, model)
    log.write("done", bytes=sum(path.stat().st_size for path in architecture.base_files(model)))
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs, sheets and the model")
    parser.add_argument("--from", dest="begin", type=Path, metavar="MODEL", help="a finished model to go on from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a number of the plan (training/plan.py)",
    )
    options = parser.parse_args(arguments)
    plan = SMOKE if options.smoke else Plan()
    kinds = {field.name: type(getattr(plan, field.name)) for field in fields(Plan)}
    for change in options.set:
        name, _, value = change.partition("=")
        if name not in kinds:
            parser.error(f"the plan has no {name!r}; it has {', '.join(kinds)}")
        number = value.lower() in ("1", "true", "yes") if kinds[name] is bool else kinds[name](value)
        plan = replace(plan, **{name: number})
    print(train(options.out, plan, torch.device(options.device), options.begin))


if __name__ == "__main__":
    main()
