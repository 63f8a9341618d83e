"""What a file of rows costs before training begins: the peak memory of a process, for files of several sizes.

Rows are texts of random words (a fixed draw), about a kilobyte each; a word is a token, and the model a tiny random Llama.
A process reads the rows, holds a fiftieth out, tokenizes, counts, loads the model and makes the trainer, which packs: all
that `trimtab run` does before its first step. The same again is what every other process does, and every later run: it
maps what the first one has stored.

    extra       anonymous memory at its peak, beyond what the process has before it reads rows: what nobody can take away
    mapped      pages of files at their peak, which the system takes back when it needs them

A stored row for each size and process.

    python benchmarks/scale/rows.py                             writes benchmarks/results/rows.json
    python benchmarks/scale/rows.py --megabytes 3 --out /tmp/rows.json
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "results" / "rows.json"
SIZES = (30, 100, 300)
WORDS = 20_000


def words() -> list[str]:
    """Words of syllables, the short ones first."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    return ["".join(draw.choices(syllables, k=1 + i * 4 // WORDS)) for i in range(WORDS)]


def write_rows(file: Path, megabytes: float) -> None:
    """Rows of texts, until the file has its size."""
    draw, known, size = random.Random(1), words(), 0
    weights = [1 / (i + 20) for i in range(WORDS)]
    with file.open("w", encoding="utf-8") as lines:
        while size < megabytes * 1e6:
            drawn = draw.choices(known, weights, k=150_000)
            for i in range(0, len(drawn), 300):
                size += lines.write(json.dumps({"text": " ".join(drawn[i : i + 300])}) + "\n")


def write_model(folder: Path) -> None:
    """A tiny model, and a tokenizer of such words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    known = {word: number for number, word in enumerate(["<eos>", "<unk>", *dict.fromkeys(words())])}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(known), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


class Peak:
    """Looks at this process's memory twenty times a second."""

    def __init__(self) -> None:
        self.most = {"RssAnon": 0, "RssFile": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.most:
                self.most[name] = max(self.most[name], int(value.split()[0]) * 1024)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self._look()

    def end(self) -> dict[str, int]:
        """The largest of each, in bytes."""
        self._over.set()
        self._thread.join()
        self._look()
        return self.most


def prepare(model: Path, data: Path, output: Path) -> None:
    """All before the first step."""
    from trimtab.pipeline.checks import gather
    from trimtab.recipe.recipe import from_dict
    from trimtab.training.build import build
    from trimtab.training.trainer import packed

    recipe = from_dict(
        {
            "name": "rows",
            "model": {"path": str(model)},
            "method": {"name": "lr-qat", "rank": 4},
            "rules": [{"match": "*", "grid": {"bits": 4, "group": 32}}],
            "data": {"path": str(data), "block_tokens": 1024},
            "train": {"steps": 10, "batch_tokens": 8192},
            "output": str(output),
        }
    ).with_its_rates()
    given = gather(recipe, False, False)
    sequences, _ = packed(build(recipe, given), given.tokenizer, recipe, given.labelled)
    assert len(sequences) > 0


def child(folder: Path) -> None:
    """Measure, after a first pass over a few rows: libraries are loaded then."""
    prepare(folder / "model", folder / "few.jsonl", Path(tempfile.mkdtemp(dir=folder)) / "out")
    before, began, most = Peak().end(), time.monotonic(), Peak()
    prepare(folder / "model", folder / "many.jsonl", Path(tempfile.mkdtemp(dir=folder)) / "out")
    found = most.end()
    row = {
        "seconds": round(time.monotonic() - began, 1),
        "extra_bytes": found["RssAnon"] - before["RssAnon"],
        "mapped_bytes": found["RssFile"] - before["RssFile"],
    }
    print(json.dumps(row))


def measured(folder: Path, megabytes: float, times: int) -> list[dict[str, Any]]:
    """The rows of one size: the process that reads first, and those behind it."""
    write_rows(folder / "many.jsonl", megabytes)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_CACHE": str(folder / "cache")}
    rows = []
    for process in ("first", "other")[:times]:
        command = [sys.executable, __file__, "--child", str(folder)]
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"megabytes": megabytes, "process": process, **json.loads(said.splitlines()[-1])})
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="*", default=SIZES)
    parser.add_argument("--processes", type=int, default=2, help="1 measures only the first")
    parser.add_argument("--scratch", type=Path, help="where files of several times that size have room")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        write_model(folder / "model")
        write_rows(folder / "few.jsonl", 0.5)
        rows: list[dict[str, Any]] = []
        for megabytes in options.megabytes:
            rows += measured(folder, megabytes, options.processes)
            options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
