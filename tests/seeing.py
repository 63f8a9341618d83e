"""What a model that sees or hears goes through here: tuned on text, folded, saved, read again, written in other formats."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForMultimodalLM

import families
import trimtab as tt
from gguf_models import byte_level_tokenizer
from trimtab.errors import UserError
from trimtab.formats.export import export
from trimtab.methods import LrQat
from trimtab.models.load import load_float
from trimtab.models.opening import owners_of_experts
from trimtab.models.transformers_bridge import quant_layers

FORMATS = ("dense", "compressed-tensors", "gguf")
IDS = torch.arange(12)[None] * 5 % 90


class Outcome(NamedTuple):
    """Of one family."""

    kind: str
    """The model's class."""
    quantized: list[str]
    """Layers in few bits."""
    towers: bool
    """Whether every parameter that is none of a quantized layer came back as it was."""
    reloaded: bool
    """Whether transformers and `load` read the saved model as this class, with its logits to the bit."""
    exported: dict[str, float | str]
    """By format: the largest difference of the logits of what transformers (for GGUF, trimtab) reads; or the refusal."""


def tuned(model_type: str, folder: Path, formats: tuple[str, ...] = FORMATS) -> Outcome:
    """Two steps of LR-QAT on text, and all that follows; a `UserError` where the family is refused."""
    model = families.random_model(model_type, AutoModelForMultimodalLM, vocabulary=260)
    kind, before, tokenizer = type(model), dict(model.named_parameters()), byte_level_tokenizer()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "base" / "preprocessor_config.json").write_text('{"size": 8}', encoding="utf-8")
    zero = "symmetric" if owners_of_experts(model) else "integer"  # packed experts have no zeros
    rules = [{"match": "*", "grid": {"bits": 4, "group": None, "zero": zero}}]
    ours, _ = tt.load(str(folder / "base"), LrQat(rank=2), rules, dtype=torch.float32, quiet=True)
    assert type(ours).__name__ == kind.__name__
    layers = quant_layers(ours)
    optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=1e-2)
    ours.train()
    for _ in range(2):
        ours(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours.eval()
    tt.fold(ours)
    after = {n: p for n, p in ours.named_parameters() if n in before}
    same = all(torch.equal(p, before[n]) for n, p in after.items())
    expected = families.logits(ours)
    tt.save(ours, folder / "saved", tokenizer)
    again = [tt.load(str(folder / "saved"), dtype=torch.float32, quiet=True)[0], kind.from_pretrained(folder / "saved")]
    reloaded = all(type(m).__name__ == kind.__name__ and torch.equal(families.logits(m), expected) for m in again)
    found = {name: _exported(name, folder / "saved", kind, expected) for name in formats}
    return Outcome(kind.__name__, list(layers), same, reloaded, found)


def _exported(name: str, saved: Path, kind: Any, expected: torch.Tensor) -> float | str:
    try:
        export(str(saved), name)
    except UserError as error:
        return str(error).removeprefix(f"export: {name}: ")
    if name == "gguf":
        read = load_float(str(saved / name / "model.gguf"), dtype=torch.float32)
    else:
        assert (saved / name / "preprocessor_config.json").is_file()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read = kind.from_pretrained(saved / name, dtype=torch.float32).eval()
    return (families.logits(read) - expected).abs().max().item()
