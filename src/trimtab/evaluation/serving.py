"""Served = trained: the log-probabilities that an engine computes from an exported folder, against the trained model's.

The engine runs in a process of its own, with the Python of its own virtual environment where one is named, by a script
that knows nothing of trimtab (`engine_*.py`). The report `parity-<engine>.json` goes into the exported folder.

Legend: W windows, L tokens in each, V vocabulary.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.devices import CPU
from trimtab.disk import replace_text
from trimtab.errors import UserError
from trimtab.evaluation.perplexity import of_loss, require_numbers
from trimtab.models.load import load
from trimtab.models.sources import open_source
from trimtab.models.whole import check
from trimtab.recipe import texts
from trimtab.recipe.inputs import held_out

_SCRIPTS = {
    "transformers": "engine_transformers.py",
    "vllm": "engine_vllm.py",
    "llama.cpp": "engine_llama_cpp.py",
    "mlx": "engine_mlx.py",
}


@dataclass(frozen=True)
class Served:
    """An engine's log-probabilities against the trained and folded model's."""

    engine: str
    tokens: int
    max_logprob: float
    """Largest absolute difference of a log-probability, over the whole vocabulary."""
    rms_logprob: float
    """Root mean square difference of the log-probabilities."""
    top1_agreement: float
    """Share of positions with the same most likely token."""
    perplexity_trained: float
    perplexity_served: float
    device: str = "cpu"
    """Where the trained model was computed."""


def python_of(engine: str, python: str | None) -> str:
    """The Python that runs an engine: as given, from TRIMTAB_<ENGINE>_PYTHON, or our own."""
    if engine not in _SCRIPTS:
        raise UserError(f"--engine: {engine!r} is none of {', '.join(_SCRIPTS)}")
    variable = f"TRIMTAB_{engine.upper().replace('.', '_')}_PYTHON"
    found = python or os.environ.get(variable) or sys.executable
    if not Path(found).is_file():
        raise UserError(f"{engine}: no Python at {found}; pass --python or set {variable}")
    return found


def engine_logprobs(
    directory: Path, engine: str, windows_WL: Tensor, python: str | None = None, device: torch.device = CPU
) -> Tensor:
    """Log-probabilities float32 (W, L - 1, V) that an engine computes from a folder: transformers on this device, another
    where it sees fit.

    Raises:
        UserError: with the end of what the engine said, if it cannot run the folder.
    """
    script = Path(__file__).with_name(_SCRIPTS.get(engine, ""))
    chosen = python_of(engine, python)
    with tempfile.TemporaryDirectory() as folder:
        tokens, out = Path(folder) / "tokens.safetensors", Path(folder) / "logprobs.safetensors"
        save_file({"blocks": windows_WL.contiguous()}, tokens)
        command = [chosen, "-P", str(script), str(directory), str(tokens), str(out)]
        command += [str(device)] if engine == "transformers" else []
        heard: dict[str, Any] = {"encoding": "utf-8", "errors": "replace"}  # whatever the locale is
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **heard)
        if done.returncode:
            died = f"ended by signal {-done.returncode}: " if done.returncode < 0 else ""
            raise UserError(f"{directory}: {engine} cannot run it: {died}{_reason(done.stdout)}")
        return load_file(out)["logprobs"]


_MEANINGS = {"cpu_gemm_wna16": "vLLM has no kernel of 4-bit layers for this processor: on x86 they need AVX-512"}
"""What engines say of processors, in words."""


def _reason(output: str) -> str:
    """The last line that names an error, and all that follows."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    asserted = next((line[line.index("GGML_ASSERT") :] for line in lines if "GGML_ASSERT" in line), None)
    if asserted is not None:  # what follows is a trace of the process that ended itself
        return asserted
    last = max((i for i, line in enumerate(lines) if "Error" in line), default=max(len(lines) - 5, 0))
    said = " ".join(lines[last:])[-2000:]
    meant = [words for name, words in _MEANINGS.items() if name in said]
    return "; ".join([*meant, said])


@torch.no_grad()
def model_logprobs(model: PreTrainedModel, windows_WL: Tensor) -> Tensor:
    """Log-probabilities float32 (W, L - 1, V), on the host, of a model in memory."""
    model.eval()
    windows = windows_WL.to(next(model.parameters()).device)
    found = [model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1] for ids in windows]
    return torch.stack([logits.float().log_softmax(-1).cpu() for logits in found])


def compare(engine: str, trained_WLV: Tensor, served_WLV: Tensor, windows_WL: Tensor) -> Served:
    """Compare log-probabilities (W, L - 1, V) on the same tokens."""
    for whose, logprobs in (("the trained model", trained_WLV), (engine, served_WLV)):
        require_numbers(logprobs, whose, logprobs.dtype)
    worst, squares, agree = 0.0, 0.0, 0
    for a, b in zip(trained_WLV, served_WLV, strict=True):
        difference = (a.double() - b.double()).abs()
        worst = max(worst, difference.max().item())
        squares += difference.square().sum().item()
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
    positions = trained_WLV.shape[0] * trained_WLV.shape[1]
    return Served(
        engine=engine,
        tokens=windows_WL.numel(),
        max_logprob=worst,
        rms_logprob=math.sqrt(squares / trained_WLV.numel()),
        top1_agreement=agree / positions,
        perplexity_trained=_perplexity(trained_WLV, windows_WL),
        perplexity_served=_perplexity(served_WLV, windows_WL),
    )


def _perplexity(logprobs_WLV: Tensor, windows_WL: Tensor) -> float:
    loss = -logprobs_WLV.gather(-1, windows_WL[:, 1:, None]).double().mean().item()
    return of_loss(loss, "parity", logprobs_WLV.dtype)


def parity(
    directory: str, engine: str, *, python: str | None = None, trained: str | None = None, path: str | None = None,
    tokens: int = 512, window: int = 128, device: torch.device = CPU,
) -> Served:  # fmt: skip
    """Run an engine on an exported folder and write `parity-<engine>.json` into it.

    Args:
        directory: the exported folder.
        engine: transformers, vllm, llama.cpp or mlx.
        python: of the engine's virtual environment; None for TRIMTAB_<ENGINE>_PYTHON, or our own.
        trained: the folder that trimtab saved; None for the one that holds `directory`.
        path: held-out text; None for what the recipe names.
        tokens: how many to compare on.
        window: tokens read together.
        device: that trained model and transformers compute on; another engine runs where it sees fit.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"{directory}: no such directory")
    native = Path(trained) if trained else folder.absolute().parent
    if not (native / "config.json").is_file() or not open_source(str(native)).prepared:
        raise UserError(f"{native}: holds no model saved by trimtab to compare with; pass --trained")
    check(folder)
    python_of(engine, python)
    if tokens < 2:
        raise UserError(f"--tokens: {tokens} tokens predict nothing; give at least 2")
    model, tokenizer = load(str(native), device=device, quiet=True)
    if path is None:
        block = held_out(native)
        rows = None if block is None else texts.held_out(block)
        if rows is None:
            raise UserError(f"{native}: its recipe names no held-out data; pass --data")
    else:
        rows = load_rows(path)
    if tokenizer is None:
        raise UserError(f"{native}: was saved without a tokenizer; add its tokenizer files to it")
    windows = token_windows(rows, tokenizer, block_tokens=min(window, tokens), limit_tokens=tokens)
    served = engine_logprobs(folder, engine, windows, python, device)
    found = replace(compare(engine, model_logprobs(model, windows), served, windows), device=str(device))
    replace_text(folder / f"parity-{engine}.json", json.dumps(asdict(found), indent=2) + "\n")
    return found
