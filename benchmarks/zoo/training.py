"""The training loop the zoo's scripts share: cosine learning rate, EMA, checkpoints that resume, progress."""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from amg.replacing import replacing


def arguments(description: str, steps: int, batch: int, learning_rate: float) -> argparse.Namespace:
    """The command line every training script has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder the finished model is written to")
    parser.add_argument("--work", type=Path, required=True, help="folder for the resumable checkpoint")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=250)
    return parser.parse_args()


def train(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], args: argparse.Namespace) -> nn.Module:
    """Minimise `loss(model, step)` with AdamW and return the exponential moving average of the weights.

    Seeds every step from (seed, step), so a resumed run sees the same batches as an uninterrupted one. Writes
    `training.json` (steps, seconds, threads, losses) beside the checkpoint.
    """
    args.work.mkdir(parents=True, exist_ok=True)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    first, spent, losses = _resume(args.work / "checkpoint.pt", model, average, optimizer)
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, mininterval=20)
    began = time.monotonic()
    for step in progress:
        torch.manual_seed(args.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * _cosine(step, args.steps)
        value = loss(model, step)
        if not math.isfinite(value.item()):
            raise FloatingPointError(f"the loss is {value.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        _average(average, model, min(0.999, (1 + step) / (10 + step)))
        losses.append(value.item())
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            seconds = spent + time.monotonic() - began
            _save(args, model, average, optimizer, step + 1, seconds, losses)
            progress.set_description(f"loss {sum(losses[-200:]) / len(losses[-200:]):.4f}")
    return average


def _cosine(step: int, steps: int, warm_up: int = 100) -> float:
    return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    mine, theirs = list(average.parameters()), list(model.parameters())
    torch._foreach_mul_(mine, decay)
    torch._foreach_add_(mine, theirs, alpha=1 - decay)
    for kept, seen in zip(average.buffers(), model.buffers(), strict=True):
        kept.copy_(seen)


def _save(
    args: argparse.Namespace,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    losses: list[float],
) -> None:
    state = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
        "losses": losses,
    }
    with replacing(args.work / "checkpoint.pt") as partial:
        torch.save(state, partial)
    record = {
        "steps": step,
        "of": args.steps,
        "batch": args.batch,
        "learning_rate": args.lr,
        "seed": args.seed,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": sum(losses[-200:]) / len(losses[-200:]),
    }
    (args.work / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def _resume(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[float]]:
    if not path.exists():
        return 0, 0.0, []
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"], state["losses"]
