"""`trimtab compare`: any two models that a recipe could name, on one text, into a folder with a table and a page."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.data.rows import load_rows
from trimtab.data.sequences import check_tokens, token_windows
from trimtab.devices import described, resolve
from trimtab.errors import UserError
from trimtab.evaluation.comparing import Comparison, apart, check_same_tokens, summary
from trimtab.extras import require_library
from trimtab.formats.directory import check_replaceable, replacing
from trimtab.formats.manifest import write_json
from trimtab.models.positions import require_length
from trimtab.models.with_adapter import base_and_adapter, disk_bytes, load_model
from trimtab.outputs import output
from trimtab.pages import report

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PROBES = (
    "Tokens, words & numbers: 1234567.",
    "naïve façade\n\tfor i in range(10): pass",
    "  two  spaces, 漢字 and 🙂",
)


def compare(
    first: str,
    second: str,
    data: str,
    *,
    first_adapter: str | None = None,
    second_adapter: str | None = None,
    split: str = "train",
    tokens: int | None = 8192,
    block_tokens: int = 512,
    dtype: str = "bfloat16",
    device: str | torch.device = "auto",
    out: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Compare two models on one text: KL divergence, agreement, the perplexity of each, and their sizes.

    Args:
        first: a directory, a .gguf file, a hub id, a model saved by trimtab, or a PEFT LoRA directory that names its base.
        second: the model that it is compared with.
        data: the text, in the forms of a recipe's `data.path`.
        first_adapter: directory of a PEFT LoRA that acts beside the first model; None for none.
        second_adapter: the same for the second model.
        split: split of a hub data set or of `pydoc-topics`.
        tokens: compare on at most this many tokens; None for all.
        block_tokens: length of a window, in tokens.
        dtype: dtype that both compute in: bfloat16, float16 or float32.
        device: where both compute: auto (a GPU if there is one), cpu, cuda, cuda:N, mps or xpu.
        out: folder of `compare.json` and `report.html`; None for `runs/compare-<first>-<second>`.
        say: called with a line for each stage.

    Returns:
        What was measured, as in `compare.json`.

    Raises:
        UserError: for models with different tokenizers, and for anything else the user can fix.

    Examples:
        >>> tt.compare("base", "runs/small", "heldout.jsonl", second_adapter=None)
    """
    require_library("`trimtab compare`", "datasets")
    _check(dtype, tokens=tokens, block_tokens=block_tokens)
    where = resolve(device, "device")
    named = [(first, first_adapter), (second, second_adapter)]
    names = [_name(path, adapter) for path, adapter in named]
    folder = output(Path("runs") / f"compare-{_short(first)}-{_short(second)}" if out is None else out, "--out")
    check_replaceable(folder, "comparison", overwrite=True, remedy="name another --out")
    rows = load_rows(data, split=split)
    loaded = [_load(name, which, dtype, where, say) for name, which in zip(names, named, strict=True)]
    windows = _windows(loaded, rows, data, block_tokens if tokens is None else min(block_tokens, tokens), tokens)
    say(f"comparing them on {described(where)}, on {windows.numel():,} tokens of {data}")
    sides = [(name, disk_bytes(*which)) for name, which in zip(names, named, strict=True)]
    about = {"first": sides[0], "second": sides[1], "data": data, "split": split}
    found = summary(apart(loaded[0][0], loaded[1][0], windows), windows, loaded[0][1], **about)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder, "comparison", overwrite=True) as staging:
        write_json(staging / "compare.json", found.to_json())
        report.make(staging, say, name=f"{_short(first)} and {_short(second)}")
    say(f"written to {folder}")
    return found


def _load(
    name: str, which: tuple[str, str | None], dtype: str, device: torch.device, say: Callable[[str], None]
) -> tuple[Any, Any]:
    say(f"loading {name}")
    return load_model(*which, dtype=_DTYPES[dtype], device=device)


def _check(dtype: str, **tokens: int | None) -> None:
    if dtype not in _DTYPES:
        raise UserError(f"dtype: {dtype!r} is none of {', '.join(_DTYPES)}")
    for option, value in tokens.items():
        if value is not None and value < 2:
            raise UserError(f"{option}: {value} tokens predict nothing; give at least 2")


def _windows(
    loaded: Sequence[tuple[PreTrainedModel, Any]], rows: Any, data: str, block_tokens: int, tokens: int | None
) -> Tensor:
    """The tokens (W, L) that both models are run on, after a look at whether both know them."""
    tokenizers = [tokenizer for _, tokenizer in loaded]
    windows = token_windows(rows, tokenizers[0], block_tokens=block_tokens, limit_tokens=tokens)
    check_same_tokens(
        tokenizers[0], tokenizers[1], [*_PROBES, tokenizers[0].decode(windows[0], skip_special_tokens=True)]
    )
    for model, tokenizer in loaded:
        check_tokens(windows, tokenizer, model.config.get_text_config().vocab_size, data)
        require_length(model, block_tokens, "block_tokens")
    return windows


def _name(path: str, adapter: str | None) -> str:
    base, adapter = base_and_adapter(path, adapter)
    return base if adapter is None else f"{base} + {adapter}"


def _short(path: str) -> str:
    """The last part of a path, as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", Path(path).resolve().name if Path(path).exists() else path.replace("/", "-"))
