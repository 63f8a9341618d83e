"""Which method goes into which format, exactly, and does the engine that reads it agree?

    python benchmarks/serving/serving.py                      verdict of every cell, by the declarations
    python benchmarks/serving/serving.py --measure 'lr-qat:*' --minutes 60      and parity of these cells, in the engines
    python benchmarks/serving/serving.py --model FILE         parity of another model, LR-QAT at 4 bits only
    TRIMTAB_VLLM_PYTHON, TRIMTAB_LLAMA_CPP_PYTHON, TRIMTAB_MLX_PYTHON name the engines' Pythons (`make test-serving`)
    python benchmarks/report.py formats                       docs/formats.md

A refused cell is also exported lossily: the relative error is that of the matrices of the model's first block, rounded
to the nearest grid that the format holds. A measured cell is trained for a few steps, folded and exported; the engine's
log-probabilities are compared with those of the folded model. The engine's own noise is measured in the same run: the same
engine and format on the untuned, rounded model; where an adapter may be kept, which adds no noise while it is zero, on the
model after one step. Cells that stand in `results/serving.json` are not measured again.
Engine `vllm` of compressed-tensors needs a GPU and is not measured; `native` is what the engines are compared with. vLLM is
asked not to round inputs that no file asks it to round (`VLLM_CPU_INT4_W4A8`). Other models' rows stand in
`results/serving_models.json`, where there are any.
"""

import argparse
import json
import os
import tempfile
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from trimtab import methods
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.evaluation import serving
from trimtab.formats import ALL
from trimtab.formats.lossy import nearest_grid
from trimtab.formats.refusals import not_run, refusals
from trimtab.formats.written import planned
from trimtab.layers.weights import AffineWeight
from trimtab.methods import Method
from trimtab.models.load import load
from trimtab.models.sources import open_source
from trimtab.models.targets import targets
from trimtab.pipeline.run import run
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid
from trimtab.recipe import recipe
from trimtab.recipe.rules import Rule

Model = tuple[str, str, int]
"""(method, zero, bits)."""
RESULTS = Path(__file__).parents[1] / "results" / "serving.json"
OTHERS = RESULTS.with_name("serving_models.json")
MODEL = "smollm2-135m"
BITS = (2, 3, 4, 8)
GROUP = 64
METHODS: dict[str, dict[str, Any]] = {"lr-qat": {"rank": 32, "alpha": 32.0}}
"""Options beside the name: the paper's alpha of 1 moves no code in a few steps."""
RATES = {"qat": 1e-4, "lr-qat": 5e-2, "qa-hira": 1e-2, "qa-lora": 1e-2, "qa-blora": 1e-2, "qlora": 1e-2, "q-bara": 1e-2}
"""Learning rates that move codes, zeros or adapters in a few steps: a model left as it was would prove nothing."""
NARROW_LR_QAT = 1e-2
"""Of LR-QAT at 2 and 3 bits: what these cells were measured with."""
MLX_WINDOWS = 1
"""MLX takes minutes for more on a CPU."""
SCALE_RATE, SMALL_SCALE_RATE = 1e-3, 3e-5
"""Of scales; those of 8 bits, and of models that nothing is known of, are small."""
OTHER_EXITS = [("compressed-tensors", "transformers"), ("compressed-tensors", "vllm-cpu"), ("gguf", "llama.cpp"),
               ("mlx", "mlx"), ("dense", "transformers"), ("dense", "vllm")]  # fmt: skip
ENGINES = ("transformers", "vllm", "vllm-cpu", "llama.cpp", "mlx")
MEASURED = ("tokens", "steps", "codes_moved", "top1_agreement", "rms_logprob", "max_logprob", "engine_noise",
            "perplexity_trained", "perplexity_served")  # fmt: skip
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
    source = open_source(MODEL)
    laid_out = source.layout()
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
        for format_ in ALL:
            layers = planned(found, method, False, format_)
            refused = refusals(format_, layers, torch.bfloat16)
            row: dict[str, Any] = {"method": name, "zero": zero, "bits": bits, "format": format_.name}
            if refused:
                row |= {"verdict": "refused", "reason": refused[0].cause, "remedy": refused[0].remedy}
                row["lossy_error"] = lossy_error(format_, refused, layers, method, weights)
                rows.append({**row, "engine": None})
                continue
            merged = format_.adapters == "merged" and any(layer.adapter for layer in layers)
            for engine in format_.engines:
                objections = [] if format_.everything else not_run(engine, format_, layers, torch.bfloat16)
                verdict = "algebraic" if merged else "exact"
                rows.append({**row, "engine": engine.name, "verdict": "not run" if objections else verdict})
    return rows


def wanted(rows: list[dict[str, Any]], patterns: list[str], again: bool) -> dict[Model, list[dict[str, Any]]]:
    """Rows to measure, by the model that is trained for them; of each kind of grid the untuned one is first."""
    models: dict[Model, list[dict[str, Any]]] = {}
    for row in rows:
        cell = ":".join(str(row[k]) for k in ("method", "zero", "bits", "format", "engine"))
        # Engine `vllm` of a low-bit format stands for a GPU; the computer at hand has a row of its own, `vllm-cpu`.
        engines = ENGINES if row["format"] in ("dense", "peft") else [e for e in ENGINES if e != "vllm"]
        runs = row["verdict"] in ("exact", "algebraic") and row["format"] != "native" and row["engine"] in engines
        if runs and any(fnmatch(cell, p) for p in patterns) and (again or "rms_logprob" not in row):
            models.setdefault((row["method"], row["zero"], row["bits"]), []).append(row)
    return dict(sorted(models.items(), key=lambda item: (item[0][1:], item[0][0] != "rtn")))


@dataclass(frozen=True)
class Made:
    """A model that was trained and served."""

    served: dict[tuple[str, str], serving.Served]
    """By (format, engine)."""
    codes: torch.Tensor | None
    """Of one layer; None for a table of values."""

    def moved(self, untuned: torch.Tensor | None) -> float | None:
        """Share of the layer's codes that are not the untuned model's."""
        if self.codes is None or untuned is None:
            return None
        return (self.codes != untuned).float().mean().item()


def served(model: Model, exits: list[tuple[str, str]], steps: int, tokens: int, path: str = MODEL) -> Made:
    """Train a model once, export it to each format, and compare each (format, engine) with it."""
    name, zero, bits = model
    grid = {"codebook": "nf4", "group": GROUP} if zero == "nf4" else {"bits": bits, "group": GROUP, "zero": zero}
    found, small = {}, bits == 8 or path != MODEL
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        values: dict[str, Any] = {
            "model": {"path": path},
            "method": {"name": name, **METHODS.get(name, {})},
            "rules": [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, {"match": "*", "grid": grid}],
            "train": {"steps": 0},
            "evaluate": {"parity": False},
            "export": ["native", *dict.fromkeys(format_ for format_, _ in exits)],
            "output": str(out),
        }
        if steps:
            values["data"] = {"path": "pydoc-topics", "block_tokens": 128, "limit": 40}
            values["train"] = {"steps": steps, "batch_tokens": 256, "micro_batch": 2}
            rate = NARROW_LR_QAT if name == "lr-qat" and bits < 4 else RATES.get(name)
            values["train"] |= {"lr": rate, "lr_scale": SMALL_SCALE_RATE if small else SCALE_RATE}
        run(recipe.from_dict(values))
        trained, tokenizer = load(str(out))
        rows = load_rows("pydoc-topics", split="test")
        blocks = token_windows(rows, tokenizer, block_tokens=128, limit_tokens=tokens)
        expected = serving.model_logprobs(trained, blocks)
        base = trained.get_submodule("model.layers.0.mlp.up_proj").base
        codes = base.integer_codes() if isinstance(base, AffineWeight) else None
        del trained
        for format_, engine in exits:
            few = MLX_WINDOWS if engine == "mlx" else len(blocks)
            computed = serving.engine_logprobs(out / format_, engine.removesuffix("-cpu"), blocks[:few])
            found[format_, engine] = serving.compare(engine, expected[:few], computed, blocks[:few])
    return Made(found, codes)


class Untuned:
    """What an engine itself adds: its difference from the *untuned* model, measured once in a run for each use."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.known: dict[tuple[Model, str, str], serving.Served] = {}
        self.codes: dict[Model, torch.Tensor | None] = {}

    def of(self, model: Model, exits: list[tuple[str, str]]) -> Made:
        """A method that may keep an adapter is its own untuned model, after one step; of all others it is RTN."""
        alone = model[1] in ("real", "nf4")
        untuned = model if alone else ("rtn", *model[1:])
        missing = [e for e in exits if (untuned, *e) not in self.known]
        if missing:
            made = served(untuned, missing, int(alone), self.tokens)
            self.known |= {(untuned, *e): found for e, found in made.served.items()}
            self.codes[untuned] = made.codes
        return Made({e: self.known[untuned, *e] for e in exits}, self.codes[untuned])


def filled(model: Model, steps: int, made: Made, noise: Made, exit_: tuple[str, str]) -> dict[str, Any]:
    """What was measured of a cell."""
    this, untuned = made.served[exit_], noise.served[exit_]
    moved = made.moved(noise.codes)
    assert this.perplexity_trained != untuned.perplexity_trained or not steps, f"{model}: training changed nothing"
    # At 8 bits LR-QAT keeps no fraction of a step, so that a few steps move scales alone.
    assert moved or model[0] not in ("lr-qat", "qat") or model[2] == 8, f"{model}: training moved no code"
    found = {k: getattr(this, k) for k in MEASURED if hasattr(this, k)}
    return {**found, "steps": steps, "codes_moved": moved, "engine_noise": untuned.rms_logprob}


def measure_other(path: str, steps: int, tokens: int) -> None:
    """Rows of another model: LR-QAT at 4 bits in every engine, against the noise of the rounded model."""
    model: Model = ("lr-qat", "symmetric", 4)
    noise = served(("rtn", "symmetric", 4), OTHER_EXITS, 0, tokens, path)
    made = served(model, OTHER_EXITS, steps, tokens, path)
    rows = [r for r in others() if r["model"] != Path(path).stem]
    for exit_ in OTHER_EXITS:
        row: dict[str, Any] = {"model": Path(path).stem, **dict(zip(("method", "zero", "bits"), model, strict=True))}
        row |= {"format": exit_[0], "engine": exit_[1], "verdict": "exact"}
        rows.append(row | filled(model, steps, made, noise, exit_))
        print(json.dumps(rows[-1]), flush=True)
    OTHERS.write_text(json.dumps({"group": GROUP, "rows": rows}, indent=1) + "\n")


def others() -> list[dict[str, Any]]:
    """The stored rows of other models."""
    return list(json.loads(OTHERS.read_text())["rows"]) if OTHERS.exists() else []


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("method", "zero", "bits", "format", "engine"))


def write(rows: list[dict[str, Any]]) -> None:
    RESULTS.write_text(json.dumps({"model": MODEL, "group": GROUP, "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", default=[], help="method:zero:bits:format:engine, with * and ?")
    parser.add_argument("--model", help="a file or folder: measure this model instead")
    parser.add_argument("--again", action="store_true", help="measure again what stands there")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after this time")
    options = parser.parse_args()
    deadline = time.time() + 60 * options.minutes
    os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")
    if options.model:
        measure_other(options.model, options.steps, options.tokens)
    stored = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    kept = {key(r): {k: r.get(k) for k in MEASURED} for r in stored if "rms_logprob" in r}
    rows = [{**row, **kept.get(key(row), {})} for row in verdicts()]
    write(rows)
    untuned = Untuned(options.tokens)
    for model, cells in wanted(rows, options.measure, options.again).items():
        if time.time() > deadline:
            break
        exits = [(row["format"], row["engine"]) for row in cells]
        noise, steps = untuned.of(model, exits), 0 if model[0] == "rtn" else options.steps
        made = served(model, exits, steps, options.tokens) if steps else noise
        for row in cells:
            row |= filled(model, steps, made, noise, (row["format"], row["engine"]))
            print(json.dumps(row), flush=True)
        write(rows)


if __name__ == "__main__":
    main()
