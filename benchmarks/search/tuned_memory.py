"""Training memory of the rows of `tuned.py` at the shapes of Llama-7B pruned alike: `memory.plan`, on paper.

Widths of a search on a model of fewer layers are stretched over 32: layer i takes those of layer i * layers // 32. All rows
have the same batch (one micro-batch a step, as the study's), checkpointing and (chunked) loss, in two settings: each block
recomputed in backward, and nothing recomputed, with the batch of the AutoMixQ code. `benchmarks/memory/memory.py` holds the
plan to what is measured.

    python benchmarks/search/tuned_memory.py                  what is not planned yet, into search_tuned_memory.json
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from trimtab import methods
from trimtab.memory.peak import peak_of_training
from trimtab.pruning.structures import layout
from trimtab.pruning.widths import choose, describe
from trimtab.recipe.rules import parse_rules

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS, read, say
from benchmarks.search.tuned import RATIOS, ROWS, SCALES, Row, Scale, rules

SEVEN_B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
SETTINGS = {"1 x 512, recomputed": (1, 512, True), "4 x 256, kept": (4, 256, False)}
"""Sequences, tokens in each, whether blocks are recomputed."""
PLANNED = [task for task, scale in SCALES.items() if scale.model == Scale.model]
"""Tasks whose model is large enough to say something of 7B."""


def skeleton(config: LlamaConfig) -> Any:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config).train()


def pruned(shape: dict[str, Any], ratio: int, multiple_of: int) -> LlamaConfig:
    """The config with so many percent of the decoder's parameters removed, as nearly alike from heads and channels."""
    config = LlamaConfig(**shape)
    about = layout(skeleton(config))
    remove = -(-ratio * (about.parameters - about.embedding_parameters) // 100)
    found = choose(config, about, [], "random", remove=remove, multiple_of=multiple_of, keep=())
    made: LlamaConfig = describe(config, about, found)
    return made


def stretched(digits: str, layers: int) -> str:
    return "".join(digits[i * len(digits) // layers] for i in range(layers))


def plan(config: LlamaConfig, row: Row, group: int, widths: dict[str, str] | None, setting: str) -> dict[str, Any]:
    batch, tokens, checkpointing = SETTINGS[setting]
    found = widths and {part: stretched(digits, config.num_hidden_layers) for part, digits in widths.items()}
    given = rules(row, group, found)
    options = {key: value for key, value in row.method.items() if key != "name"}
    options |= {"rank": Scale.rank, "alpha": float(Scale.rank)}
    planned = peak_of_training(
        skeleton(config),
        methods.make(row.method["name"], **options),
        None if given is None else parse_rules([{"match": "lm_head", "grid": None}, *given]),
        micro_batch=batch,
        block_tokens=tokens,
        dtype=torch.bfloat16,
        checkpointing=checkpointing,
        micro_batches=1,
    )
    return {"total_bytes": planned.total, **asdict(planned)}


def plan_all(results: Path, shape: dict[str, Any] = SEVEN_B, group: int = Scale.group) -> None:
    """Plan every row whose widths are known and that is not planned yet, into search_tuned_memory.json."""
    file = results / "search_tuned_memory.json"
    done: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []
    searches = {s["cell"]: s["widths"] for s in read(results / "search_tuned_widths.jsonl")}
    for ratio in RATIOS:
        config = pruned(shape, ratio, group)
        for row in ROWS:
            # Without training, or on the same widths whatever the task.
            for name in [f"{t}-{ratio}-{row.name}" for t in PLANNED] if row.searched else [f"{ratio}-{row.name}"]:
                widths = searches.get(name)
                if not row.trained or (row.searched and widths is None):
                    continue
                for setting in SETTINGS:
                    key = {"row": name, "setting": setting, "widths": widths}
                    if any(key.items() <= r.items() for r in done):
                        continue
                    started = time.time()
                    found = plan(config, row, group, widths, setting)
                    done = [r for r in done if (r["row"], r["setting"]) != (name, setting)] + [{**key, **found}]
                    about = {"shape": shape, "settings": SETTINGS}
                    file.write_text(json.dumps({**about, "rows": done}, indent=1) + "\n")
                    say(f"{name}, {setting}: {found['total_bytes'] / 1e9:.2f} GB ({time.time() - started:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    plan_all(parser.parse_args().results)


if __name__ == "__main__":
    main()
