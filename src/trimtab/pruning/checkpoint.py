"""A checkpoint in, a smaller one out: what `trimtab prune` does.

    DIR/config.json, model.safetensors, tokenizer files      an ordinary model of its own architecture, no pickles
    DIR/pruning.json                                          options, widths and parameters before and after

The directory is written beside its destination and moved there in one step: it is whole or it is not there. Its
`manifest.json` is what `trimtab verify` checks.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.data.rows import PYDOC_TOPICS, load_rows
from trimtab.data.sequences import token_windows
from trimtab.data.sources import Source
from trimtab.data.templates import set_template
from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.formats.directory import replacing
from trimtab.formats.manifest import write_json
from trimtab.models import contents
from trimtab.models.contents import Contents
from trimtab.models.load import load_float
from trimtab.models.positions import require_length
from trimtab.models.sources import open_source
from trimtab.outputs import output
from trimtab.pruning.pruning import Options, Pruned, prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DECIDES = ("model", "dtype", "options", "calibration")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def prune_checkpoint(
    path: str,
    out: str | os.PathLike[str],
    options: Options,
    *,
    text: str = PYDOC_TOPICS,
    split: str = "train",
    tokens: int = 8192,
    block_tokens: int = 256,
    dtype: str = "bfloat16",
    device: torch.device = CPU,
    rows: Callable[[], Any] | None = None,
    template: str | None = None,
    read: Contents | None = None,
) -> Pruned:
    """Load a float model, prune it, and write it.

    Args:
        path: a directory, GGUF file, hub id or `smollm2-135m`; a GGUF file is dequantized.
        out: directory, new or empty.
        options: what to remove.
        text: calibration data, in any form that a recipe's `data.path` takes; read only where it is needed.
        split: of it.
        tokens: calibration tokens, at most.
        block_tokens: length of a calibration window.
        dtype: of the model, in memory and in the file: bfloat16, float16 or float32.
        device: to compute on.
        rows: reads the calibration rows, in place of `text`, which then only names them.
        template: chat template of the tokenizer, by name or file; None for its own.
        read: contents of `rows`; None for those of `text`.
    """
    target, about = check_empty(out), asked(path, options, text, split, tokens, block_tokens, dtype, read)
    if dtype not in _DTYPES:
        raise UserError(f"prune: dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    source = open_source(path)
    if source.prepared:
        raise UserError(f"{path}: already quantized; prune the float model first, then quantize what is left")
    tokenizer, windows = source.tokenizer(), None
    if options.reads_text:
        set_template(tokenizer, template)
        calibrated = load_rows(text, split=split) if rows is None else rows()
        windows = token_windows(calibrated, tokenizer, block_tokens=block_tokens, limit_tokens=tokens)
    model = load_float(path, dtype=_DTYPES[dtype], device=device, source=source)
    if windows is not None:
        require_length(model, windows.shape[1], "block_tokens")
    pruned = prune(model, options, windows)
    save(model, target, tokenizer, about | asdict(pruned))
    return pruned


def asked(
    path: str,
    options: Options,
    text: str,
    split: str,
    tokens: int,
    block_tokens: int,
    dtype: str,
    read: Contents | None = None,
) -> dict[str, Any]:
    """All that a pruned model follows from, as `pruning.json` holds it; where that lay is beside it, for people."""
    calibration: dict[str, Any] = {"tokens": tokens, "block_tokens": block_tokens}
    if options.reads_text:
        calibration["text"] = read or contents.of_text(Source(text, split))
    about = {
        "paths": {"model": path, "text": text},
        "model": contents.of_model(path),
        "dtype": dtype,
        "options": asdict(options),
        "calibration": calibration if options.reads_text else None,
    }
    same: dict[str, Any] = json.loads(json.dumps(about))
    return same


def made_from(out: Path) -> dict[str, Any] | None:
    """What `asked` was of the pruned model in this directory, without paths; None if there is none."""
    file = out / "pruning.json"
    if not file.exists():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    return {key: report.get(key) for key in _DECIDES}


def other(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what a pruned model (`made_from`) differs from what is `asked`, for a message; "" for nothing."""
    if not isinstance(made["model"], Mapping):
        return "an earlier version made it, which did not note what it read"
    return contents.change(made, {key: now[key] for key in _DECIDES})


def check_empty(out: str | os.PathLike[str]) -> Path:
    """The directory, if nothing is in the way of writing it."""
    target = output(out, "--out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there already and not an empty directory; remove it or name another")
    return target


def save(model: "PreTrainedModel", target: Path, tokenizer: Any, report: dict[str, Any]) -> None:
    """Write a pruned model in one step."""
    with replacing(target, "pruned") as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_json(folder / "pruning.json", report)
