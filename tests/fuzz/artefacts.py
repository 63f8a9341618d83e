"""What is tried: a tiny valid artefact of each kind, what of it is changed and how, and the call that a user reads it by.

`Target.peer`, of what another library reads too, says what that one computes: a load with other numbers than the
original's is a legal one where both agree.
"""

import csv
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pyarrow
import torch
import yaml
from pyarrow import parquet
from torch import Tensor
from transformers import AutoModelForCausalLM

import gguf_models
import tiny
import trimtab as tt
from fuzz.changes import (
    Change,
    bytes_changed,
    gguf_changed,
    json_changed,
    misplaced,
    safetensors_changed,
    template_changed,
    yaml_changed,
)
from trimtab.models.with_adapter import load_model
from trimtab.recipe.recipe import as_recipe

IDS = torch.arange(40, 56).view(1, 16)
_GRID = [{"match": "*", "grid": {"bits": 4, "group": 32}}]
_CONFIG: dict[str, list[Any]] = {
    "tie_word_embeddings": [True, False, "false", 0],
    "num_hidden_layers": [0, 1, 3, 1000, 10**6, 10**9],
    "hidden_size": [0, 63, 128, 10**6],
    "head_dim": [0, 1, 16, 17, 10**9],
    "vocab_size": [0, 1, 256, 261, 10**9],
    "max_position_embeddings": [0, 1, 10**9, 10**18],
    "model_type": ["gpt2", "t5", "qwen2", "nothing", "trimtab"],
    "architectures": [[], ["GPT2LMHeadModel"], ["x"], [None]],
    "dtype": ["float16", "float8_e4m3fn", "int8", "x", "nn"],
    "torch_dtype": ["float16", "x"],
    "rope_parameters": [
        None,
        {},
        {"rope_type": "yarn"},
        {"rope_theta": "x", "rope_type": "default"},
        {"rope_type": "x"},
    ],
    "rope_scaling": [{"type": "linear", "factor": 0}, {"rope_type": "dynamic", "factor": -1}, "x"],
    "quantization_config": [
        {},
        {"quant_method": "gptq"},
        {"quant_method": "trimtab"},
        "trimtab",
        {"quant_method": ["trimtab"]},
    ],
    "auto_map": [{"AutoConfig": "x.C"}, "x", {"AutoModelForCausalLM": 3}],
    "transformers_weights": [
        "../x.safetensors",
        "/etc/passwd",
        "x.safetensors",
        3,
        ["model.safetensors"],
        "model.safetensors",
    ],
    "layer_types": [[], ["full_attention"], ["x", "x"], "full_attention", ["sliding_attention"] * 2],
    "per_layer_config": [{"0": {"num_hidden_layers": 3}}, {"9": {"hidden_size": 1}}, [], {"x": 1}],
    "attn_implementation": ["flash_attention_2", "x"],
    "hidden_act": ["x", "", "gelu", None],
    "attention_bias": [True],
    "is_encoder_decoder": [True],
    "text_config": [{}, {"vocab_size": 3}, "x"],
    "base_model_tp_plan": ["x", {}],
    "tp_plan": ["auto"],
    "gguf_file": ["x.gguf"],
    "_name_or_path": ["/etc", 3],
    "_attn_implementation": ["x/y", "kernels-community/x"],
    "num_local_experts": [8],
    "pad_token_id": [-1, 10**9, "x"],
}
_TOKENIZER: dict[str, list[Any]] = {
    "tokenizer_class": ["LlamaTokenizer", "x", None, "PreTrainedModel", "AutoTokenizer", "GPT2Tokenizer"],
    "auto_map": [{"AutoTokenizer": ["x.T", None]}, "x"],
    "chat_template": ["{% for", "x", 3, [], [{"name": "default", "template": "x"}], {"default": "x"}, None],
    "eos_token": ["nothing", None, 3, {"content": "<eos>", "__type": "AddedToken"}, {"content": 3}],
    "added_tokens_decoder": [{}, {"256": {"content": "x"}}, {"x": {}}, {"-1": {"content": "y"}}, []],
    "model_max_length": [0, -1, 1e30, "x"],
    "extra_special_tokens": [{"image_token": "<x>"}, ["<x>"], "x"],
    "vocab_file": ["/etc/passwd", 3],
    "clean_up_tokenization_spaces": [True, "x"],
}
_INDEX: dict[str, list[Any]] = {
    "weight_map": [[], {}, None, "x", {"x": "../x.safetensors"}, {"lm_head.weight": "model.safetensors"}]
}
_ADAPTER: dict[str, list[Any]] = {
    "base_model_name_or_path": ["", "/", "..", ".", 3, None, ["../base"], "x/y", "../adapter", "/dev/zero"],
    "r": [0, -1, 3, "8", 1.5, 10**9, True, None],
    "lora_alpha": [0, -8, "8", None, 1e308, True],
    "peft_type": ["IA3", None, 3, "lora", ["LORA"]],
    "rank_pattern": [{"q_proj": 3}, {"(": 3}, [], {"q_proj": "x"}, {"(a+)+$": 4}, "x"],
    "alpha_pattern": [{"q_proj": 3}, {"(.*)*x": 3}, 3],
    "use_rslora": [True, "x"],
    "use_dora": [True],
    "bias": ["all", 3],
    "target_modules": ["q_proj", [], None, 3, "all-linear"],
    "modules_to_save": [["lm_head"]],
    "layers_to_transform": [[0], 9],
}
_QUANT: dict[str, list[Any]] = {
    "quantization_config": [
        {"quant_method": "trimtab"},
        {"quant_method": "trimtab", "specs": [], "layers": {"model.embed_tokens": 0}},
        {"quant_method": "trimtab", "format_version": 10**9},
        {"quant_method": "trimtab", "format_version": "3", "layout": 3},
    ]
}
_RECIPE: dict[str, list[Any]] = {
    "model": [
        {"path": "/etc"},
        {"path": "/dev/zero"},
        {"path": "x/y"},
        {"path": 3},
        {"path": "model", "adapter": "model"},
        "model",
    ],
    "rules": [
        [],
        None,
        [{"match": "*"}],
        [{"match": "(", "grid": None}],
        [{"match": "*", "grid": {"bits": 99}}],
        [["*", None]],
    ],
    "method": [
        "rtn",
        {"name": "lora", "rank": 10**9},
        {"name": "lr-qat", "rank": -1},
        {"name": "x"},
        {"name": ["rtn"]},
    ],
    "train": [
        {"steps": 10**18},
        {"steps": -1},
        {"batch_tokens": 0},
        {"micro_batch": 10**9},
        {"processes": 10**9},
        {"lr": "x"},
    ],
    "data": [
        "/dev/zero",
        "/etc",
        {"path": [{"path": "data.jsonl", "weight": -1}]},
        {"path": "data.jsonl", "block_tokens": 10**18},
    ],
    "export": [[], ["x"], "native", ["native"] * 1000, ["gguf", "mlx", "gptq"]],
    "prune": [{"ratio": 0.5}, {"ratio": 2}, {"bytes": "1KiB"}, {"layers": 10**9}],
    "search": [{"budget": "1MiB"}, {"budget": -1}, {"budget": "x"}],
    "distill": [{}, {"teacher": "cached", "cache": "/dev/null"}],
    "start": [{"name": "gptq"}, {"path": "/dev/zero"}],
    "activations": [{"bits": 8}, {"bits": 1}],
    "kv": [{"bits": 8}, {"bits": "8"}],
    "name": ["../x", "", "a/b", "x" * 5000, None],
    "output": ["/", "", "/dev/null", "x" * 5000, "\0"],
    "inputs": [{}, {"model.path": {"x": {"bytes": 1, "sha256": "y"}}}, {"model.path": 3}],
}


class Read(NamedTuple):
    """What was computed of an artefact."""

    words: str
    """Equal only where the numbers are."""
    logits: Tensor | None = None


class Target(NamedTuple):
    """A kind of artefact and how it is read."""

    name: str
    made: str
    """Which artefact."""
    files: dict[str, Change]
    """What of it is changed, and how."""
    read: Callable[[Path, str], "Read"]
    """From its folder and the file that was changed to what was computed."""
    peer: Callable[[Path], Tensor] | None = None
    """The same of another library."""


def _digest(*parts: Any) -> str:
    made = hashlib.sha256()
    for part in parts:
        made.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "backslashreplace"))
    return made.hexdigest()[:16]


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits.float()
    return logits.contiguous()


def _read(model: Any, *more: Any) -> Read:
    found = _logits(model)
    return Read(_digest(found.numpy().tobytes(), *more), found)


# ---- reading --------------------------------------------------------------------------------------------------------


def _chat(path: Path) -> Read:
    talk: Any = tt.chat(str(path), engine="transformers", device="cpu")
    return _read(talk.model, talk.answer("Hi 1", 2))


def _prepared(path: Path) -> Read:
    model, tokenizer = tt.load(str(path), dtype=torch.float32)
    return _read(model, tokenizer("Hi 1")["input_ids"] if tokenizer else None)


def _with_adapter(path: Path) -> Read:
    """As `compare` and `eval` read it, in float32, in which the order of computing counts for little."""
    return _read(load_model(str(path), dtype=torch.float32)[0])


def _exported(path: Path) -> Read:
    out = path.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    tt.export(str(path), "dense", out, overwrite=True, device="cpu")
    return Read(_digest(*(f.read_bytes() for f in sorted(out.glob("*.safetensors")))))


def _overview(recipe: Any) -> Read:
    return Read(_digest(tt.overview(recipe).lines()))


def _of_data(folder: Path, name: str) -> Read:
    recipe = tiny.recipe(folder / "model", folder / name, folder / "out")
    del recipe["data"]["eval_path"]
    if name.endswith(".jinja"):
        recipe["data"] |= {"path": str(folder / "talk.jsonl"), "template": str(folder / name)}
    return _overview(recipe)


def _evaluated(folder: Path, name: str) -> Read:
    found = tt.evaluate(str(folder / "model"), str(folder / name), block_tokens=16, tokens=64, device="cpu")
    return Read(_digest(found.perplexity))


def _planned(folder: Path, name: str) -> Read:
    return Read(_digest(tt.plan(str(folder / name)).total))


def _looked_at(folder: Path, name: str) -> Read:
    as_recipe(folder / name).to_yaml()
    return _overview(str(folder / name))


# ---- others that read the same ---------------------------------------------------------------------------------------


def _transformers(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    model, about = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    wrong = {key: found for key, found in about.items() if found}
    assert not wrong, wrong
    return model


def _by_transformers(path: Path, **options: Any) -> Tensor:
    return _logits(_transformers(path, torch.bfloat16, **options))


def _rounded_there(path: Path) -> Tensor:
    """Read by transformers, and rounded here."""
    model = _transformers(path, torch.float32)
    tt.prepare(model, tt.methods.Rtn())
    return _logits(model)


def _by_peft(folder: Path) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return _logits(peft.PeftModel.from_pretrained(base, folder / "adapter"))


# ---- artefacts ------------------------------------------------------------------------------------------------------


def _float(folder: Path) -> None:
    tiny.model(folder / "model", tied=False)


def _tied(folder: Path) -> None:
    tiny.model(folder / "model")


def _sharded(folder: Path) -> None:
    tiny.model(folder / "whole")
    model = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.bfloat16)
    model.save_pretrained(folder / "model", max_shard_size="60KB")
    tiny.tokenizer().save_pretrained(folder / "model")
    shutil.rmtree(folder / "whole")


def _native(folder: Path) -> None:
    tiny.model(folder / "base")
    rules = [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, *_GRID]
    model, tokenizer = tt.load(str(folder / "base"), tt.methods.LrQat(rank=4), rules, dtype=torch.float32)
    tt.fold(model)
    tt.save(model, folder / "model", tokenizer)
    shutil.rmtree(folder / "base")


def _unsigned(folder: Path) -> None:
    _native(folder)
    (folder / "model" / "manifest.json").unlink()


def _gguf(folder: Path) -> None:
    gguf_models.random_model(gguf_models.FAMILIES["llama"]).bfloat16().save_pretrained(folder / "base")
    gguf_models.byte_level_tokenizer().save_pretrained(folder / "base")
    model, tokenizer = tt.load(str(folder / "base"), rules=_GRID, dtype=torch.float32)
    tt.save(model, folder / "model", tokenizer)
    tt.export(str(folder / "model"), "gguf", folder / "out", allow_lossy=True, device="cpu")
    next((folder / "out").glob("*.gguf")).rename(folder / "model.gguf")
    for left in ("out", "model", "base"):
        shutil.rmtree(folder / left)


def _packed(folder: Path, name: str) -> None:
    """As another library packs it."""
    tiny.model(folder / "base")
    rules = [{"match": "*", "grid": {"bits": 4, "group": 32, "zero": "integer", "scale_dtype": "portable"}}]
    model, tokenizer = tt.load(str(folder / "base"), rules=rules, dtype=torch.bfloat16)
    tt.save(model, folder / "saved", tokenizer)
    tt.export(str(folder / "saved"), name, folder / "model", device="cpu")
    (folder / "model" / "manifest.json").unlink()
    for left in ("saved", "base"):
        shutil.rmtree(folder / left)


def _adapter(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny.model(folder / "base"), dtype=torch.bfloat16)
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft.get_peft_model(base, config).save_pretrained(folder / "adapter")
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../base"}))


def _data(folder: Path) -> None:
    tiny.model(folder / "model")
    texts = [{"text": f"{i} plus {i + 1} is {2 * i + 1}."} for i in range(12)]
    tiny.jsonl(folder / "data.jsonl", *texts)
    (folder / "data.json").write_text(json.dumps(texts, indent=1))
    pairs = [{"prompt": f"{i}, {i + 1}?", "completion": f"{2 * i + 1}\n."} for i in range(12)]
    tiny.jsonl(folder / "pairs.jsonl", *pairs)
    turns = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i + 1}!"}]}
        for i in range(8)
    ]
    tiny.jsonl(folder / "talk.jsonl", *turns)
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(pairs)
    parquet.write_table(pyarrow.Table.from_pylist(pairs), folder / "data.parquet")
    (folder / "data.txt").write_text("One and two and three.\n" * 20)
    (folder / "chat.jinja").write_text(tiny.TEMPLATE)


def _recipe(folder: Path) -> None:
    _data(folder)
    recipe = tiny.recipe(Path("model"), Path("data.jsonl"), Path("out"))
    recipe |= {"export": ["native", "gguf"], "start": {"name": "rtn"}, "kv": {"bits": 8}}
    recipe["model"] = {"path": str(folder / "model"), "dtype": "float32"}
    recipe["data"] |= {"path": str(folder / "data.jsonl"), "eval_path": str(folder / "data.jsonl")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def _rows(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One row of a file of JSON lines, or the file's text."""
    if rng.random() < 0.25:
        return bytes_changed(rng, data)
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at], what = json_changed(
        {"messages": [[], "x", [3], [{"role": "x"}]], "text": ["", 3], "prompt": [3], "tools": [3]}
    )(rng, lines[at])
    return b"\n".join(lines) + b"\n", f"line {at + 1}: {what}"


ARTEFACTS: dict[str, Callable[[Path], None]] = {
    "float": _float,
    "tied": _tied,
    "sharded": _sharded,
    "native": _native,
    "unsigned": _unsigned,
    "gguf": _gguf,
    "gptq": partial(_packed, name="gptq"),
    "compressed": partial(_packed, name="compressed-tensors"),
    "adapter": _adapter,
    "data": _data,
    "recipe": _recipe,
}
_OF_FLOAT: dict[str, Change] = {
    "model/config.json": json_changed(_CONFIG),
    "model/generation_config.json": json_changed(
        {"max_length": [0, -1, "x"], "eos_token_id": ["x", [], [[1]], 10**9], "x": [1]}
    ),
    "model/tokenizer.json": json_changed(
        {"model": [{"type": "BPE"}, {"type": "x"}], "normalizer": [{"type": "NFC"}, {"type": "x"}]}
    ),
    "model/tokenizer_config.json": json_changed(_TOKENIZER),
    "model/chat_template.jinja": template_changed,
    "model/model.safetensors": safetensors_changed,
}
_OF_NATIVE = _OF_FLOAT | {"model/config.json": json_changed(_CONFIG | _QUANT)}
_PACKED: dict[str, list[Any]] = {
    "quantization_config": [
        {"quant_method": "gptq"},
        {"quant_method": "gptq", "bits": 4, "group_size": 0},
        {"quant_method": "gptq", "bits": "4", "group_size": [32]},
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {"quant_method": "compressed-tensors"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": [3]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ]
}
_OF_PACKED: dict[str, Change] = {
    "model/config.json": json_changed(_CONFIG | _PACKED),
    "model/model.safetensors": safetensors_changed,
}
TARGETS = {
    t.name: t
    for t in (
        Target("float", "float", _OF_FLOAT, lambda f, _: _chat(f / "model"), lambda f: _by_transformers(f / "model")),
        Target("tied", "tied", _OF_FLOAT, lambda f, _: _prepared(f / "model"), lambda f: _rounded_there(f / "model")),
        Target(
            "sharded",
            "sharded",
            {
                "model/model.safetensors.index.json": json_changed(_INDEX),
                "model/model-00001-of-00004.safetensors": safetensors_changed,
                "model/config.json": json_changed(_CONFIG),
            },
            lambda f, _: _chat(f / "model"),
            lambda f: _by_transformers(f / "model"),
        ),
        Target(
            "native",
            "unsigned",
            _OF_NATIVE,
            lambda f, _: _prepared(f / "model"),
            lambda f: _logits(_transformers(f / "model", torch.float32)),
        ),
        Target(
            "verify",
            "native",
            _OF_NATIVE | {"model/manifest.json": json_changed()},
            lambda f, _: Read(str(tt.verify(f / "model"))),
        ),
        Target(
            "export",
            "native",
            _OF_NATIVE | {"model/manifest.json": json_changed()},
            lambda f, _: _exported(f / "model"),
        ),
        Target("gptq", "gptq", _OF_PACKED, lambda f, _: _prepared(f / "model")),
        Target("compressed", "compressed", _OF_PACKED, lambda f, _: _prepared(f / "model")),
        Target("gguf", "gguf", {"model.gguf": gguf_changed}, lambda f, _: _prepared(f / "model.gguf")),
        Target(
            "gguf-chat",
            "gguf",
            {"model.gguf": gguf_changed},
            lambda f, _: _chat(f / "model.gguf"),
            lambda f: _by_transformers(f, gguf_file="model.gguf"),
        ),
        Target(
            "adapter",
            "adapter",
            {
                "adapter/adapter_config.json": json_changed(_ADAPTER),
                "adapter/adapter_model.safetensors": safetensors_changed,
            },
            lambda f, _: _with_adapter(f / "adapter"),
            _by_peft,
        ),
        Target(
            "data",
            "data",
            {
                "data.jsonl": _rows,
                "pairs.jsonl": _rows,
                "talk.jsonl": _rows,
                "data.json": json_changed(),
                "data.csv": bytes_changed,
                "data.parquet": bytes_changed,
                "data.txt": bytes_changed,
                "chat.jinja": template_changed,
            },
            _of_data,
        ),
        Target(
            "eval", "data", {"data.jsonl": _rows, "data.json": json_changed(), "data.txt": bytes_changed}, _evaluated
        ),
        Target("plan", "recipe", {"recipe.yaml": yaml_changed(_RECIPE)}, _planned),
        Target("config", "float", {"model/config.json": json_changed(_CONFIG)}, _planned),
        Target("recipe", "recipe", {"recipe.yaml": yaml_changed(_RECIPE)}, _looked_at),
    )
}
MISPLACED = 0.08
"""Share of the cases in which something else lies in a file's place."""


def spoil(target: Target, folder: Path, rng: random.Random) -> tuple[str, str]:
    """Change one file of an artefact; its name and what was done."""
    name = rng.choice(list(target.files))
    if rng.random() < MISPLACED:
        return name, misplaced(rng, folder / name)
    data = (folder / name).read_bytes()
    new, what = target.files[name](rng, data)
    (folder / name).write_bytes(new)
    return name, what


def names(wanted: Sequence[str] = ()) -> list[str]:
    """Targets by name, all of them where none is named."""
    return [name for name in TARGETS if not wanted or name in wanted]
