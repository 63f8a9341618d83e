"""Trained = folded = saved: the same logits, measured.

The trained model's logits on some held-out tokens are kept; after folding they are computed again, and after saving a
*fresh process* loads the directory by plain `from_pretrained` and computes them a third time:

    python -m trimtab.evaluation.parity DIR TOKENS.safetensors LOGITS.safetensors DTYPE DEVICE THREADS

Bitwise folds must give the very same bits each time. All three compute on one device: another would round otherwise.

Legend: W windows, L tokens in each, V vocabulary.
"""

import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.evaluation.perplexity import of_loss, require_numbers
from trimtab.models.reload import reload


@dataclass(frozen=True)
class Parity:
    """One model's logits against the trained model's."""

    stage: str
    """folded, or reloaded."""
    max_difference: float
    """Largest absolute difference of a logit."""
    rms_difference: float
    """Root mean square difference of the logits."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    kl: float
    """Mean KL divergence from the trained model's next-token distribution, in nats."""
    perplexity: float
    identical: bool
    """Whether every logit has the same bits."""


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows_WL: Tensor) -> Tensor:
    """Logits (W, L, V) in the model's dtype, window by window."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat([model(input_ids=b.unsqueeze(0).to(device), use_cache=False).logits.cpu() for b in windows_WL])


def compare(stage: str, trained_WLV: Tensor, other_WLV: Tensor, windows_WL: Tensor) -> Parity:
    """Compare logits with those of the trained model on the same tokens."""
    for whose, logits in (("trained", trained_WLV), (stage, other_WLV)):
        require_numbers(logits, f"the {whose} model", logits.dtype)
    worst, squares, agree, kl, nll, count = 0.0, 0.0, 0, 0.0, 0.0, 0
    for ours, theirs, ids in zip(trained_WLV, other_WLV, windows_WL, strict=True):
        a, b = ours.double(), theirs.double()
        worst = max(worst, (a - b).abs().max().item())
        squares += (a - b).square().sum().item()
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        kl += (log_a.exp() * (log_a - log_b)).sum().item()
        nll += F.nll_loss(log_b[:-1], ids[1:], reduction="sum").item()
        count += len(ids)
    return Parity(
        stage=stage,
        max_difference=worst,
        rms_difference=math.sqrt(squares / trained_WLV.numel()),
        top1_agreement=agree / count,
        kl=max(kl / count, 0.0),
        perplexity=of_loss(nll / (count - len(windows_WL)), f"the {stage} model", other_WLV.dtype),
        identical=torch.equal(trained_WLV, other_WLV),
    )


def reloaded_logits(directory: Path, windows_WL: Tensor, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Logits computed by a fresh process from a saved model, on the same device."""
    with tempfile.TemporaryDirectory() as folder:
        tokens, logits = Path(folder) / "tokens.safetensors", Path(folder) / "logits.safetensors"
        save_file({"blocks": windows_WL.contiguous()}, tokens)
        command = [sys.executable, "-P", "-m", __name__, str(directory), str(tokens), str(logits)]
        command += [str(dtype).removeprefix("torch."), str(device), str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            raise UserError(f"{directory}: could not be loaded in a fresh process: {done.stderr.strip()[-2000:]}")
        return load_file(logits)["logits"]


def report(
    trained_WLV: Tensor,
    folded_WLV: Tensor,
    directory: Path,
    windows_WL: Tensor,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> list[Parity]:
    """The trained model against itself, the folded one, and the one a fresh process loads from `directory`."""
    reloaded = reloaded_logits(directory, windows_WL, dtype, device)
    stages = (("trained", trained_WLV), ("folded", folded_WLV), ("reloaded", reloaded))
    return [compare(stage, trained_WLV, other, windows_WL) for stage, other in stages]


def to_json(parities: list[Parity]) -> list[dict[str, Any]]:
    """Plain values for `parity.json`."""
    return [asdict(p) for p in parities]


def _main(directory: str, tokens: str, logits: str, dtype: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model = reload(directory, getattr(torch, dtype), torch.device(device))
    save_file({"logits": logits_of(model, load_file(tokens)["blocks"])}, logits)


if __name__ == "__main__":
    _main(*sys.argv[1:])
