"""What becomes of every causal family of the installed transformers: prepared, trained, folded, saved, read back, exported.

    python benchmarks/families/every.py [NAMES]      a line for each family into results/families.jsonl, as it ends
    python benchmarks/families/every.py --exports awq      this column alone, into the lines that stand there
    python benchmarks/report.py models               docs/models.md

Models are tiny and random (`tests/families.py`, but with at least 32 inputs to a layer, which is a block of GGUF's), tuned
by LR-QAT at 4 bits with one scale a channel. A stage that fails with anything but a message of ours is a fault, and is
stored as such. Lines that stand there are left alone. What engines make of an export is asked of those that are here:
transformers, and llama.cpp where `TRIMTAB_LLAMA_CPP_PYTHON` names its Python.
"""

import argparse
import contextlib
import gc
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import families
import gguf_models
import trimtab as tt
from benchmarks.families.report import FILE
from benchmarks.files import add, put, read, say
from trimtab.errors import UserError
from trimtab.evaluation import serving
from trimtab.formats import ALL
from trimtab.layers.linear import QuantLinear
from trimtab.methods import LrQat
from trimtab.models.load import load
from trimtab.models.share import shares
from trimtab.models.transformers_bridge import quant_layers

RULES = [{"match": "*", "grid": {"bits": 4, "group": None, "scale_dtype": "portable"}}]
EXPORTS = tuple(f.name for f in ALL if f.name not in ("native", "peft"))
_LEAST, _TOKENS = 32, 320
_NOISE = 0.05
"""Of the spread of log-probabilities: what another model is off by is about 1."""


class _Ended(Exception):
    """A stage without which there is no next one did not work."""


def attempt(row: dict[str, Any], stage: str, call: Callable[[], Any], folder: Path) -> Any:
    """What a call gives; what went wrong goes into the row."""
    try:
        found = call()
    except UserError as error:
        row[stage] = f"no: {error}".replace(str(folder), "DIR")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        row[stage] = f"FAULT: {type(error).__name__}: {error}".replace(str(folder), "DIR")[:300]
    else:
        row[stage] = "yes"
        return found
    raise _Ended


def step_twice(model: PreTrainedModel) -> None:
    """Two steps on random tokens, in a loop of one's own."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(tt.param_groups(model, steps=2, lr=0.3))
    model.train()
    for _ in range(2):
        ids = torch.randint(5, 90, (2, 12))
        logits = model(input_ids=ids, use_cache=False).logits  # whose loss is ours: GIT's own needs an image
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if not loss.isfinite():
        raise RuntimeError("the loss is not finite")


def folded(model: PreTrainedModel) -> None:
    """Folding changes no logit, and training moved something."""
    trained = families.logits(model)
    layers = tt.fold(model)
    if not torch.equal(families.logits(model), trained):
        raise RuntimeError("the folded model computes other logits")
    if not any(layer.moved.codes for layer in layers):
        raise RuntimeError("training moved no code")


def reloaded(model: PreTrainedModel, tokenizer: Any, out: Path) -> None:
    """Saved and read back, the logits are the same bits."""
    before = families.logits(model)
    tt.save(model, out, tokenizer)
    again, _ = load(str(out), dtype=torch.float32)
    if not torch.equal(families.logits(again), before):
        raise RuntimeError("the model that is read back computes other logits")


def in_transformers(model: PreTrainedModel, out: Path) -> None:
    """transformers computes the logits of what was exported from that folder alone, up to the rounding of a product."""
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    theirs, ours = families.logits(again), families.logits(model)
    if not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-3 * ours.std().item()):
        raise RuntimeError(
            f"its logits differ by {(theirs - ours).abs().max():.2g} where they spread by {ours.std():.2g}"
        )


def in_llama_cpp(model: PreTrainedModel, out: Path) -> None:
    """llama.cpp computes the log-probabilities within its noise: it rounds what enters a layer to 8 bits."""
    ids = torch.arange(24).view(1, 24) * 5 % 90
    theirs, ours = serving.engine_logprobs(out, "llama.cpp", ids), serving.model_logprobs(model, ids)
    off = ((theirs - ours).square().mean().sqrt() / ours.std()).item()
    if off > _NOISE:
        raise RuntimeError(f"its log-probabilities are off by {off:.2g} of their spread")


ENGINES: dict[str, dict[str, Callable[[PreTrainedModel, Path], None]]] = {
    "dense": {"transformers": in_transformers},
    "compressed-tensors": {"transformers": in_transformers},
    "gguf": {"llama.cpp": in_llama_cpp} if "TRIMTAB_LLAMA_CPP_PYTHON" in os.environ else {},
}
"""Engines that are tried on an export, where they are installed."""


def row_of(name: str, exports: Sequence[str] = EXPORTS) -> dict[str, Any]:
    """What became of a family, in these formats."""
    row: dict[str, Any] = {"family": name}
    if name in families.NOT_BUILT:
        return row | {"prepare": f"not tried: {families.NOT_BUILT[name]}"}
    with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(_Ended):
        folder = Path(temporary)
        path = families.write(name, folder / "model")
        gguf_models.byte_level_tokenizer().save_pretrained(path)
        model, tokenizer = attempt(
            row, "prepare", lambda: load(str(path), LrQat(rank=2), RULES, dtype=torch.float32, quiet=True), folder
        )
        found = shares(model)
        row["low_bit"] = round(found.low_bit, 3)
        row["float"] = [f"{p.what}{f' ({p.why})' if p.why else ''}" for p in found.floats if p.why]
        row["layers"] = sum(isinstance(layer, QuantLinear) for layer in quant_layers(model).values())
        attempt(row, "train", lambda: step_twice(model), folder)
        attempt(row, "fold", lambda: folded(model), folder)
        attempt(row, "reload", lambda: reloaded(model, tokenizer, folder / "saved"), folder)
        for format_ in exports:
            with contextlib.suppress(_Ended):
                attempt(row, format_, lambda to=format_: tt.export(str(folder / "saved"), to, folder / to), folder)
                for engine, serves in ENGINES.get(format_, {}).items():
                    attempt(row, f"{format_} in {engine}", lambda to=format_, f=serves: f(model, folder / to), folder)
    return row


def main() -> None:
    """Try all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--exports", nargs="+", choices=EXPORTS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("trimtab").setLevel(logging.ERROR)
    larger = {families.VOCABULARY: _TOKENS, 16: _LEAST}
    families.SMALL.update({name: larger.get(size, size) for name, size in families.SMALL.items()})
    for row in read(FILE) if options.exports else ():
        if row.get("reload") == "yes" and not all(format_ in row for format_ in options.exports):
            gc.freeze()
            found = row_of(row["family"], options.exports)
            columns = {key: value for key, value in found.items() if key.partition(" in ")[0] in options.exports}
            put(FILE, [row | columns if row["family"] == other["family"] else other for other in read(FILE)])
            say(f"{row['family']}: {columns}")
    for name in () if options.exports else options.names or families.families():
        if any(row["family"] == name for row in read(FILE)) and not options.names:
            continue
        gc.freeze()  # loading collects garbage, which takes long where all of transformers is imported
        row = row_of(name)
        add(FILE, row)
        say(str(row))


if __name__ == "__main__":
    main()
