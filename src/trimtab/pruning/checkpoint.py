"""A checkpoint in, a smaller one out: what `trimtab prune` does.

    DIR/config.json, model.safetensors, tokenizer files      an ordinary model of its own architecture, no pickles
    DIR/pruning.json                                          options, widths and parameters before and after

The directory is written beside its destination and moved there in one step: it is whole or it is not there. Its
`manifest.json` is what `trimtab verify` checks.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.data.rows import PYDOC_TOPICS, load_rows
from trimtab.data.sequences import token_windows
from trimtab.data.templates import set_template
from trimtab.errors import UserError
from trimtab.formats.directory import replacing
from trimtab.formats.manifest import write_json
from trimtab.models.load import load_float
from trimtab.models.sources import open_source
from trimtab.pruning.pruning import Options, Pruned, prune

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    rows: Callable[[], Any] | None = None,
    template: str | None = None,
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
        rows: reads the calibration rows, in place of `text`, which then only names them.
        template: chat template of the tokenizer, by name or file; None for its own.
    """
    target, about = check_empty(out), asked(path, options, text, split, tokens, block_tokens, dtype)
    if dtype not in _DTYPES:
        raise UserError(f"prune: dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    source = open_source(path)
    if source.prepared:
        raise UserError(f"{path}: already quantized; prune the float model first, then quantize what is left")
    tokenizer, windows = source.tokenizer(), None
    if options.reads_text:
        set_template(tokenizer, template)
        read = load_rows(text, split=split) if rows is None else rows()
        windows = token_windows(read, tokenizer, block_tokens=block_tokens, limit_tokens=tokens)
    model = load_float(path, dtype=_DTYPES[dtype], source=source)
    pruned = prune(model, options, windows)
    save(model, target, tokenizer, about | asdict(pruned))
    return pruned


def asked(
    path: str, options: Options, text: str, split: str, tokens: int, block_tokens: int, dtype: str
) -> dict[str, Any]:
    """All that a pruned model follows from, as `pruning.json` holds it."""
    calibration = {"text": text, "split": split, "tokens": tokens, "block_tokens": block_tokens}
    about = {
        "model": path,
        "dtype": dtype,
        "options": asdict(options),
        "calibration": calibration if options.reads_text else None,
    }
    same: dict[str, Any] = json.loads(json.dumps(about))
    return same


def made_from(out: Path) -> dict[str, Any] | None:
    """What `asked` was of the pruned model in this directory; None if there is none."""
    file = out / "pruning.json"
    if not file.exists():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    return {key: report.get(key) for key in ("model", "dtype", "options", "calibration")}


def check_empty(out: str | os.PathLike[str]) -> Path:
    """The directory, if nothing is in the way of writing it."""
    target = Path(out)
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
