"""A tiny `trimtab run` of each method on the device: GPTQ start, a teacher, exports, and parity of what was saved.

python benchmarks/gpu/run.py methods
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from benchmarks.gpu.device import Rows, arguments

INT4 = {"bits": 4, "group": 32, "zero": "symmetric"}
REAL = {"bits": 4, "group": 32, "zero": "real"}
METHODS: dict[str, dict[str, Any]] = {
    "lr-qat": {"grid": INT4, "export": ["native", "compressed-tensors", "gguf", "gptq"], "gptq": True, "distill": True},
    "lr-qat-channel": {"name": "lr-qat", "grid": {**INT4, "group": None}, "export": ["native", "compressed-tensors"]},
    "peqa": {"grid": INT4, "export": ["native", "gptq", "mlx"], "gptq": True},
    "qat": {"grid": INT4, "export": ["native", "compressed-tensors"], "gptq": True},
    "qa-lora": {"grid": REAL, "export": ["native", "gguf", "mlx"], "gptq": True},
    "qa-hira": {"grid": REAL, "export": ["native", "gguf"], "distill": True},
    "qa-blora": {"grid": REAL, "export": ["native"]},
    "qlora": {"grid": {"codebook": "nf4", "group": 64, "double_quant": True}, "export": ["native", "peft", "dense"]},
    "q-bara": {"grid": {"codebook": "nf4", "group": 64}, "export": ["native", "peft"]},
    "loftq": {"grid": {"codebook": "nf4", "group": 64}, "export": ["native", "dense"]},
    "lora": {"export": ["native", "peft"]},
    "rtn": {"grid": INT4, "export": ["native", "compressed-tensors", "gguf", "gptq", "mlx", "dense"], "gptq": True},
}
RANKED = ("lr-qat", "lr-qat-channel", "qlora", "q-bara", "loftq", "lora", "qa-lora", "qa-blora")


def recipe(name: str, folder: Path, device: str) -> dict[str, Any]:
    """Of two steps."""
    import tiny

    about = METHODS[name]
    method: dict[str, Any] = {"name": about.get("name", name)} | ({"rank": 4} if name in RANKED else {})
    values = tiny.recipe(folder / "model", folder / "data.jsonl", folder / name)
    values |= {"method": method, "export": about["export"], "name": name}
    values["rules"] = [{"match": "*", "grid": about.get("grid")}] if "grid" in about else None
    values["train"] |= {"steps": 0 if name == "rtn" else 2}
    if about.get("gptq"):
        values["start"] = {"name": "gptq", "tokens": 512}
    if about.get("distill"):
        values["distill"] = {"weight": 0.5}
    values["model"]["device"] = device
    return values


def _run(name: str, folder: Path, device: str) -> dict[str, Any]:
    import trimtab

    metrics = trimtab.run(recipe(name, folder, device), overwrite=True)
    parity = json.loads((folder / name / "parity.json").read_text())
    stages = {stage["stage"]: stage["identical"] for stage in parity["stages"]}
    keep = ("train_seconds", "tokens", "peak_memory_bytes", "losses")
    return {"stages": stages, **{k: metrics[k] for k in keep if k in metrics}}


def _merged(tokenizer: Path) -> None:
    """One merge, without which llama.cpp loads no tokenizer; its result takes the place of a byte that no text has."""
    values = json.loads(tokenizer.read_text())
    vocabulary = values["model"]["vocab"]
    least = max(vocabulary.values()) - 1
    name = next(token for token, number in vocabulary.items() if number == least)
    del vocabulary[name]
    vocabulary["ab"] = least
    values["model"]["merges"] = [["a", "b"]]
    tokenizer.write_text(json.dumps(values))


def main() -> int:
    """Write the section."""
    args = arguments(__doc__)
    import tiny

    rows = Rows(args)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tiny.model(folder / "model")
        _merged(folder / "model" / "tokenizer.json")
        tiny.text(folder / "data.jsonl")
        for name in ["lr-qat"] if args.tiny else METHODS:
            rows.add(name, lambda name=name: _run(name, folder, args.device))
    return rows.failed


if __name__ == "__main__":
    sys.exit(main())
