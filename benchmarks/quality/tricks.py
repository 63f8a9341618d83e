"""Do NEFTune and LoRA+ help? On stories260K, rounded and tuned for some steps.

    NEFTune   uniform noise of alpha / sqrt(L D) on the embedded tokens in training (arXiv 2310.05914)
    LoRA+     the rate of B is so many times that of A (arXiv 2402.12354)

Each against the plain run at the best of its own rates, on the same windows and seeds: held-out loss, in nats a token.
`much` trains on windows of 1.7 MB of text, `little` goes over 32 windows again and again, which is what noise is meant
for. One line for each run goes to results/tricks.jsonl; what is there is not run again.

    python benchmarks/quality/tricks.py --data DIR
"""

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS, add, read, say
from trimtab import methods
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.models.load import load
from trimtab.training.held_out import HeldOut
from trimtab.training.loss import summed_loss

FILE = RESULTS / "tricks.jsonl"
STEPS, BATCH, LENGTH = 40, 4, 64
METHODS: dict[str, Any] = {
    "lr-qat": ({"rank": 8, "alpha": 8.0}, {"bits": 3}, 0.003),
    "qlora": ({"rank": 8, "alpha": 16.0}, {"codebook": "nf3", "group": None}, 0.0),
}
"""Options, grid, and the rate of scales as a share of their size."""
RATES = (0.001, 0.003, 0.01, 0.03)
NOISES = (5.0,)
RATIOS = (16,)
SEEDS = (0, 1)


def tuned(model: Any, windows: Tensor, *, lr: float, seed: int, noise: float, ratio: float, scales: float) -> None:
    """Train in place."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    b = [p for n, p in named.items() if n.endswith("delta.B")]
    a = [p for n, p in named.items() if n.endswith("delta.A")]
    s = [p for n, p in named.items() if n.endswith(("adapter.scale", "adapter.offset"))]
    groups: list[dict[str, Any]] = [{"params": a, "lr": lr}, {"params": b, "lr": lr * ratio}]
    groups += [{"params": [p], "lr": scales * float(p.detach().abs().mean())} for p in s]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(STEPS // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(STEPS - i, 0) / max(STEPS - warm, 1))
    )
    draw = torch.Generator().manual_seed(seed)

    def noisy(_: Any, __: Any, out: Tensor) -> Tensor:
        return out + (torch.rand(out.shape, generator=draw) * 2 - 1).to(out.dtype) * noise / (out[0].numel() ** 0.5)

    handle = model.get_input_embeddings().register_forward_hook(noisy) if noise else None
    model.train()
    for _ in range(STEPS):
        ids = windows[torch.randint(len(windows), (BATCH,), generator=draw)]
        (summed_loss(model, ids, input_ids=ids, use_cache=False) / ids[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()


class Runs:
    """Runs by what was asked, each once."""

    def __init__(self, data: Path) -> None:
        self.model = str(data / "stories260k")
        _, tokenizer = load(self.model, methods.Rtn(), [{"match": "*", "grid": {"bits": 8}}], dtype=torch.float32)
        train, valid = (load_rows(str(data / "tinystories" / f"{part}.jsonl")) for part in ("train", "valid"))
        much = token_windows(train, tokenizer, block_tokens=LENGTH, limit_tokens=100_000, spread=True)
        held = token_windows(valid, tokenizer, block_tokens=LENGTH, limit_tokens=16_384, spread=True)
        self.windows = {"much": much, "little": much[:: len(much) // 32][:32]}
        self.held_out = HeldOut([(row, row) for row in held])
        self.known = {tuple(sorted(line["asked"].items())): line["loss"] for line in read(FILE)}

    def loss(self, **asked: Any) -> float:
        """Held-out loss after a run; `asked` has method, text, lr, seed, noise and ratio."""
        key = tuple(sorted(asked.items()))
        if key not in self.known:
            options, grid, scales = METHODS[asked["method"]]
            torch.manual_seed(asked["seed"])
            rules = [{"match": "*", "grid": grid}]
            method = methods.make(asked["method"], **options)
            model, _ = load(self.model, method, rules, dtype=torch.float32)
            about = {k: asked[k] for k in ("lr", "seed", "noise", "ratio")}
            tuned(model, self.windows[asked["text"]], **about, scales=scales)
            self.known[key] = self.held_out.loss(model, 1024)
            add(FILE, {"asked": asked, "loss": self.known[key]})
            say(f"{asked} {self.known[key]:.4f}")
        return self.known[key]

    def best(self, method: str, text: str, rates: tuple[float, ...] = RATES, **trick: Any) -> tuple[float, list[float]]:
        """The best rate by the first seed, and the losses of all seeds at it."""
        about = {"method": method, "text": text, "noise": 0.0, "ratio": 1, **trick}
        lr = min(rates, key=lambda lr: self.loss(lr=lr, seed=SEEDS[0], **about))
        return lr, [self.loss(lr=lr, seed=seed, **about) for seed in SEEDS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k and tinystories")
    runs = Runs(parser.parse_args().data)
    for text in ("much", "little"):
        for method in METHODS:
            lr, plain = runs.best(method, text)
            tricks: dict[str, Any] = {f"NEFTune {noise:g}": ({"noise": noise}, (lr,)) for noise in NOISES}
            if text == "much":
                tricks |= {f"LoRA+ {ratio}": ({"ratio": ratio}, (lr / ratio, lr / ratio**0.5)) for ratio in RATIOS}
            say(f"== {method}, {text}: plain {mean(plain):.4f} at {lr:g}")
            for name, (trick, rates) in tricks.items():
                rate, losses = runs.best(method, text, rates, **trick)
                gaps = [a - b for a, b in zip(losses, plain, strict=True)]
                listed = ", ".join(f"{g:+.4f}" for g in gaps)
                say(f"== {method}, {text}: {name} at {rate:.3g}: {mean(gaps):+.4f} (by seed: {listed})")


if __name__ == "__main__":
    main()
