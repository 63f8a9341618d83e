"""Which method goes into which format, exactly, and does the engine that reads it agree? Writes docs/formats.md.

python benchmarks/serving.py                                          verdict of every cell, by the declarations
python benchmarks/serving.py --measure lr-qat:4:compressed-tensors:vllm ...          and parity of these cells
    TRIMTAB_VLLM_PYTHON names the Python of vLLM's environment (`make test-serving` makes one in .venv-serving)

A refused cell is also exported lossily: the relative error is that of the matrices of the model's first block, rounded
to the nearest grid that the format holds. A measured cell is trained for a few steps, folded and exported; the engine's
log-probabilities are compared with those of the folded model. The engine's own noise is measured in the same run: the same
engine and format on the untuned, rounded model. Rows of `results/serving.json` that are not measured again are kept.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from trimtab import data, export, loading, methods, pipeline, recipe
from trimtab.evaluate import serving
from trimtab.export import declaration, exporting
from trimtab.export.lossy import nearest_grid
from trimtab.grid import AnyGrid, CodebookGrid, Grid
from trimtab.methods import Method
from trimtab.preparing import targets
from trimtab.rules import Rule
from trimtab.weights import AffineWeight

RESULTS = Path(__file__).parent / "results" / "serving.json"
DOCS = Path(__file__).parent.parent / "docs" / "formats.md"
MODEL = "smollm2-135m"
BITS = (2, 3, 4, 8)
GROUP = 64
ZEROS = {"symmetric": ("rtn", "peqa", "lr-qat", "qat"), "integer": ("rtn", "lr-qat", "qa-hira", "qa-lora", "qa-blora"),
         "real": ("qa-hira", "qa-lora"), "nf4": ("qlora", "q-bara", "qa-hira")}  # fmt: skip


def grids() -> list[tuple[str, str, int, AnyGrid]]:
    """(method, zero, bits, grid) of every row of the table."""
    rows: list[tuple[str, str, int, AnyGrid]] = []
    for zero, names in ZEROS.items():
        for name in names:
            for bits in BITS:
                if zero != "nf4":
                    rows.append((name, zero, bits, Grid(bits, GROUP, zero)))  # type: ignore[arg-type]
                elif bits == 4:
                    rows.append((name, zero, bits, CodebookGrid("nf4", GROUP)))
    return rows


def lossy_error(
    format_: Any, refused: list[Any], layers: list[Any], method: Method, weights: dict[str, Any]
) -> float | None:
    """Relative error of the refused matrices of the first block in the nearest grid that the format holds."""
    if format_.adapters == "kept":
        return None  # what is rounded into a matrix is no adapter any more
    squared, squares = 0.0, 0.0
    by_name = {layer.name: layer for layer in layers}
    for refusal in refused:
        layer = by_name.get(refusal.layer)
        if layer is None:
            return None
        if layer.name not in weights:
            continue
        old = method.build(weights[layer.name], layer.grid)[0].dequantize(torch.float32)
        grid = nearest_grid(format_, layer, torch.bfloat16)
        new = old.bfloat16().float() if grid is None else AffineWeight.quantize(old, grid).dequantize(torch.float32)
        squared += (new - old).square().sum().item()
        squares += old.square().sum().item()
    return (squared / squares) ** 0.5 if squares else None


def verdicts() -> list[dict[str, Any]]:
    """One row for each method, grid, format and engine."""
    source, laid_out = loading.skeleton(MODEL)
    assert source is not None
    source.bind(laid_out)
    rows = []
    weights: dict[str, Any] = {}
    for name, zero, bits, grid in grids():
        method = methods.make(name)
        found = targets(laid_out, method, [Rule("*", grid)])
        for target in found:
            if target.name.startswith("model.layers.0.") and target.name not in weights:
                weight = source.read(f"{target.name}.weight")
                weights[target.name] = weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)
        for format_ in export.ALL:
            layers = exporting.planned(found, method, False, format_)
            refused = declaration.refusals(format_, layers, torch.bfloat16)
            row: dict[str, Any] = {"method": name, "zero": zero, "bits": bits, "format": format_.name}
            if refused:
                row |= {"verdict": "refused", "reason": refused[0].cause, "remedy": refused[0].remedy}
                row["lossy_error"] = lossy_error(format_, refused, layers, method, weights)
                rows.append({**row, "engine": None})
                continue
            merged = format_.adapters == "merged" and any(layer.adapter for layer in layers)
            for engine in format_.engines:
                objections = [] if format_.everything else declaration.not_run(engine, format_, layers, torch.bfloat16)
                verdict = "algebraic" if merged else "exact"
                rows.append({**row, "engine": engine.name, "verdict": "not run" if objections else verdict})
    return rows


def tuned(name: str, zero: str, bits: int, format_: str, steps: int, folder: Path) -> Path:
    """Run a recipe that exports to this format."""
    grid = {"codebook": "nf4", "group": GROUP} if zero == "nf4" else {"bits": bits, "group": GROUP, "zero": zero}
    values: dict[str, Any] = {
        "model": {"path": MODEL},
        "method": {"name": name},
        "rules": [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, {"match": "*", "grid": grid}],
        "evaluate": {"parity": False},
        "export": ["native", format_],
        "output": str(folder),
    }
    if steps:
        values["data"] = {"path": "pydoc-topics", "block_tokens": 128, "limit": 40}
        values["train"] = {"steps": steps, "batch_tokens": 256, "micro_batch": 2, "lr_scale": 1e-3}
    else:
        values["train"] = {"steps": 0}
    pipeline.run(recipe.from_dict(values))
    return folder / format_


def measured(cell: str, steps: int, tokens: int) -> dict[str, Any]:
    """Parity of one cell, and the engine's noise on the untuned model."""
    name, bits, format_, engine, *rest = cell.split(":")
    zero = rest[0] if rest else "symmetric"
    found: dict[str, Any] = {"method": name, "zero": zero, "bits": int(bits), "format": format_, "engine": engine}
    runs = {}
    for kind, method, count in (("noise", "rtn", 0), ("tuned", name, steps)):
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "run"
            folder = tuned(method, zero, int(bits), format_, count, out)
            model, tokenizer = loading.load(str(out))
            rows = data.load_rows("pydoc-topics", split="test")
            blocks = data.token_blocks(rows, tokenizer, block_tokens=128, limit_tokens=tokens)
            served = serving.engine_logprobs(folder, engine.removesuffix("-cpu"), blocks)
            runs[kind] = serving.compare(engine, serving.model_logprobs(model, blocks), served, blocks)
            shutil.rmtree(out)
    found |= {"verdict": "exact", "tokens": runs["tuned"].tokens, "steps": steps}
    found |= {"top1_agreement": runs["tuned"].top1_agreement, "rms_logprob": runs["tuned"].rms_logprob}
    found |= {"max_logprob": runs["tuned"].max_logprob, "engine_noise": runs["noise"].rms_logprob}
    found |= {
        "perplexity_trained": runs["tuned"].perplexity_trained,
        "perplexity_served": runs["tuned"].perplexity_served,
    }
    return found


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("method", "zero", "bits", "format", "engine"))


def document(rows: list[dict[str, Any]]) -> str:
    """docs/formats.md."""
    lines = [
        "# Formats",
        "",
        "Generated by `benchmarks/serving.py` from the declarations in `src/trimtab/export` and",
        "`benchmarks/results/serving.json`.",
        "",
        "## What each format holds, and what engines run of it",
        "",
        "The same as `trimtab formats`. What an engine runs is read from its code; what was measured stands below.",
        "",
        "| " + " | ".join(declaration.HEADER) + " |",
        "|---" * len(declaration.HEADER) + "|",
        *("| " + " | ".join(row) + " |" for row in declaration.table(export.ALL)),
        "",
        "## Method x bits x format",
        "",
        f"Groups of {GROUP}, bfloat16. *exact*: the served matrices are the trained ones, bit for bit in the model's",
        "dtype; *algebraic*: an adapter is added to a dense matrix, rounded once; *refused* with its reason, and the",
        f"relative weight error of `--allow-lossy` on the matrices of the first block of {MODEL}.",
        "",
        "| method | zero | bits | " + " | ".join(f.name for f in export.ALL) + " |",
        "|---|---|---" + "|---" * len(export.ALL) + "|",
    ]
    reasons: dict[str, int] = {}
    for name, zero, bits, _ in grids():
        cells = []
        for format_ in export.ALL:
            row = next(r for r in rows if key(r)[:4] == (name, zero, bits, format_.name))
            if row["verdict"] != "refused":
                cells.append("exact" if row["verdict"] == "not run" else row["verdict"])
                continue
            number = reasons.setdefault(f"{row['reason']}; {row['remedy']}", len(reasons) + 1)
            error = row["lossy_error"]
            cells.append(f"refused ({number})" + ("" if error is None else f", lossy {error:.2g}"))
        lines.append(f"| {name} | {zero} | {bits} | {' | '.join(cells)} |")
    lines += ["", *(f"{n}. {reason}" for reason, n in reasons.items()), "", "## Served = trained", ""]
    lines += [
        "Log-probabilities of the engine against those of the trained and folded model, over the whole vocabulary; the"
    ]
    lines += ["noise is the engine's own, on the untuned model. The bound is 1.5 times the noise.", ""]
    lines += ["| method | zero | bits | format | engine | top-1 | RMS | noise | within |", "|---" * 9 + "|"]
    for row in rows:
        if "rms_logprob" not in row:
            continue
        within = "yes" if row["rms_logprob"] <= 1.5 * row["engine_noise"] else "no"
        lines.append(
            f"| {row['method']} | {row['zero']} | {row['bits']} | {row['format']} | {row['engine']} "
            f"| {row['top1_agreement']:.2%} | {row['rms_logprob']:.3g} | {row['engine_noise']:.3g} | {within} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", default=[], help="method:bits:format:engine[:zero]")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    kept = {
        key(r): r for r in (json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []) if "rms_logprob" in r
    }
    for cell in options.measure:
        row = measured(cell, options.steps, options.tokens)
        kept[key(row)] = row
        print(json.dumps(row), flush=True)
    rows = [{**row, **kept.pop(key(row), {})} for row in verdicts()]
    rows += kept.values()
    RESULTS.write_text(json.dumps({"model": MODEL, "group": GROUP, "rows": rows}, indent=1) + "\n")
    DOCS.write_text(document(rows))


if __name__ == "__main__":
    main()
