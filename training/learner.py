"""One optimisation step of any stage: bfloat16 networks, float32 weights behind them, running averages, CUDA graphs.

The networks are small, so a step is thousands of short kernels: recorded once as a CUDA graph it takes half the time of
the same kernels launched one by one, and bfloat16 throughout takes two thirds of the time of autocast, whose norms
are float32. (`torch.compile` needs minutes for this UNet, too long for a run this short.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.logbook import Checkpoint, schedule
from training.plan import Plan

Inputs = dict[str, Tensor]


class Learner:
    """What a stage trains. `modules` keep float32 weights; `live` are what a step runs, bfloat16 if the plan says so.

    `loss(live, inputs)` is called under the recorder: it may draw random numbers on the device, and must not look at
    a tensor's value.
    """

    def __init__(
        self,
        stage: str,
        modules: dict[str, nn.Module],
        rates: dict[str, float],
        loss: Callable[[dict[str, Any], Inputs], Tensor],
        steps: int,
        plan: Plan,
        out: Path,
        device: torch.device,
    ) -> None:
        self.stage = stage
        self.modules, self.rates, self.loss, self.steps, self.plan = modules, rates, loss, steps, plan
        for module in modules.values():
            module.train()
        # Rates and the average's weight are tensors, so that a recorded graph sees them change.
        self.lr = {name: torch.tensor(rates[name], device=device) for name in modules}
        self.keep = torch.tensor(0.0, device=device)
        self.optimizer = torch.optim.AdamW(
            [{"params": list(module.parameters()), "lr": self.lr[name]} for name, module in modules.items()],
            betas=(0.9, 0.99),
            weight_decay=0.01,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.parameters = [parameter for module in modules.values() for parameter in module.parameters()]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.average = {name: copy.deepcopy(module).requires_grad_(False) for name, module in modules.items()}
        self.averaged = [parameter for module in self.average.values() for parameter in module.parameters()]
        self.live: dict[str, Any] = dict(modules)
        if plan.bf16:
            self.live = {name: copy.deepcopy(module).bfloat16() for name, module in modules.items()}
        self.working = [parameter for module in self.live.values() for parameter in module.parameters()]
        for parameter in self.working:
            parameter.grad = torch.zeros_like(parameter)
        self.recorder = Recorder(self._step, plan.graphs and device.type == "cuda")
        self.checkpoint = Checkpoint(out / "checkpoints", stage)
        self.start = 0
        state = self.checkpoint.load()
        if state:
            self._restore(state)

    @property
    def done(self) -> bool:
        return self.start >= self.steps

    def __call__(self, step: int, inputs: Inputs) -> Tensor:
        """One step; the loss stays on the device, and is overwritten by the next call."""
        share = schedule(step, self.steps, self.plan.warmup)
        for name, rate in self.rates.items():
            self.lr[name].fill_(rate * share)
        self.keep.fill_(min(self.plan.ema, (1 + step) / (10 + step)))
        loss = self.recorder(inputs)
        if self.checkpoint.due():
            self.checkpoint.save(self._state(step + 1, whole=True))
        return loss

    def finish(self) -> None:
        """Put the averages in the modules' place, and keep them."""
        if not self.done:
            self.checkpoint.save(self._state(self.steps, whole=False))
        for name, module in self.modules.items():
            module.load_state_dict(self.average[name].state_dict())
            module.eval()
            for parameter in module.parameters():
                parameter.grad = None

    def _step(self, inputs: Inputs) -> Tensor:
        torch._foreach_zero_(_grads(self.working))
        loss = self.loss(self.live, inputs)
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            if self.plan.bf16:
                torch._foreach_copy_(_grads(self.parameters), _grads(self.working))
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
            self.optimizer.step()
            weights: list[Tensor] = [parameter.detach() for parameter in self.parameters]
            if self.plan.bf16:
                torch._foreach_copy_([parameter.detach() for parameter in self.working], weights)
            # Not a lerp: its weight would have to leave the device, which a graph can't do.
            averaged: list[Tensor] = [parameter.detach() for parameter in self.averaged]
            apart = list(torch._foreach_sub(weights, averaged))
            torch._foreach_mul_(apart, 1 - self.keep)
            torch._foreach_add_(averaged, apart)
        return loss.detach()

    def _state(self, step: int, whole: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"step": step}
        found["average"] = {name: module.state_dict() for name, module in self.average.items()}
        if whole:
            found["modules"] = {name: module.state_dict() for name, module in self.modules.items()}
            found["optimizer"] = self.optimizer.state_dict()
        return found

    def _restore(self, state: dict[str, Any]) -> None:
        self.start = int(state["step"])
        for name, module in self.modules.items():
            self.average[name].load_state_dict(state["average"][name])
            module.load_state_dict(state.get("modules", state["average"])[name])
            if self.plan.bf16:
                self.live[name].load_state_dict(module.state_dict())
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
            for group, name in zip(self.optimizer.param_groups, self.modules, strict=True):
                group["lr"] = self.lr[name]


def _grads(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class Recorder:
    """Runs a step of fixed shapes; on a GPU records it once per shape as a CUDA graph and replays it."""

    def __init__(self, step: Callable[[Inputs], Tensor], graphs: bool) -> None:
        self.step, self.graphs = step, graphs
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = {}
        self.seen: dict[Any, int] = {}
        self.pool: Any = None

    def __call__(self, inputs: Inputs) -> Tensor:
        if not self.graphs:
            return self.step(inputs)
        shape = tuple(tuple(tensor.shape) for tensor in inputs.values())
        if shape not in self.recorded:
            # A few steps as usual first: libraries choose their algorithms and make their workspaces.
            self.seen[shape] = self.seen.get(shape, 0) + 1
            if self.seen[shape] <= 3:
                side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    loss = self.step(inputs)
                torch.cuda.current_stream().wait_stream(side)
                return loss
            held = {name: tensor.clone() for name, tensor in inputs.items()}
            graph = torch.cuda.CUDAGraph()
            # Graphs run one after the other and keep nothing but the loss, so they share their memory.
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self.step(held)
            self.pool = self.pool or graph.pool()
            self.recorded[shape] = (graph, held, loss)
        graph, held, loss = self.recorded[shape]
        for name, tensor in inputs.items():
            held[name].copy_(tensor)
        graph.replay()
        return loss.clone()


def seeded_steps(learner: Learner, seed: int) -> Iterator[int]:
    """The steps that are left, the device's random numbers seeded for where they start."""
    torch.manual_seed(seed + 1_000_003 * learner.start)
    yield from range(learner.start, learner.steps)
