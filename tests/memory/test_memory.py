"""Predicted bytes against the bytes of real models and real forward passes, and the two ways to read what is resident."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import tiny
from trimtab import methods
from trimtab.kernels import products
from trimtab.layers.linear import QuantLinear
from trimtab.memory import process
from trimtab.memory.peak import Plan, kept_for_backward, peak_of_training
from trimtab.memory.plan import plan
from trimtab.methods import Loftq, Lora, LrQat, Method, Peqa, QaBlora, QaHira, QaLora, Qat, QBara, Qlora, Rtn
from trimtab.models.prepare import prepare, prepare_meta
from trimtab.models.sources import open_source
from trimtab.models.transformers_bridge import cast_floats, quant_layers
from trimtab.recipe.recipe import from_dict
from trimtab.recipe.rules import parse_rules

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=False)
TIED = LlamaConfig(**SIZES, tie_word_embeddings=True)
QWEN = Qwen2Config(**SIZES, tie_word_embeddings=False)
GEMMA = Gemma3TextConfig(
    **SIZES, head_dim=16, sliding_window=16, layer_types=["sliding_attention", "full_attention"], bos_token_id=1
)
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
FLOAT_DOWN = {"match": "*.down_proj", "grid": None}


def everywhere(**grid: Any) -> dict[str, Any]:
    return {"match": "*", "grid": grid}


def head_too(rule: dict[str, Any]) -> list[dict[str, Any]]:
    """The rule, and the head by name: `*` does not mean it."""
    return [{**rule, "match": "lm_head"}, rule]


INTEGER, REAL, NF4 = (
    everywhere(bits=3, group=32, zero="integer"),
    everywhere(bits=4, group=32, zero="real"),
    everywhere(codebook="nf4", group=32, double_quant=True),
)
# name -> method, rules, config
PLANS: dict[str, tuple[Method, list[dict[str, Any]] | None, PreTrainedConfig]] = {
    "rtn": (Rtn(), [EMBEDDING, INTEGER], TIED),
    "lora": (Lora(rank=4), None, LLAMA),
    "lora, some layers": (Lora(rank=4), [FLOAT_DOWN, {"match": "*", "grid": "float"}], QWEN),
    "qlora": (Qlora(rank=4), head_too(NF4), LLAMA),
    "qa-lora": (QaLora(rank=4), head_too(REAL), LLAMA),
    "loftq": (Loftq(rank=4), [NF4], LLAMA),
    "q-bara": (QBara(rank=4), [EMBEDDING, NF4], TIED),
    "qa-hira": (QaHira(), [FLOAT_DOWN, REAL], LLAMA),
    "qa-hira, integer": (QaHira(repeat=2), [INTEGER], QWEN),
    "qa-blora": (QaBlora(rank=4), [EMBEDDING, NF4], TIED),
    "peqa": (Peqa(), head_too(everywhere(bits=2, zero="real", scale_dtype="float32")), LLAMA),
    "lr-qat": (LrQat(rank=4), [EMBEDDING, INTEGER], TIED),
    "lr-qat, head": (LrQat(rank=4, k=2, storage="bf16"), [EMBEDDING, FLOAT_DOWN, *head_too(everywhere(bits=4))], LLAMA),
    "lr-qat, gemma": (LrQat(rank=4, storage="int"), [EMBEDDING, INTEGER], GEMMA),
    "qat": (Qat(), head_too(REAL), LLAMA),
}


def model_of(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


@pytest.fixture(autouse=True)
def fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are those of a processor that needs no blocks in float32; what is measured runs in processes of its own."""
    monkeypatch.setattr(products, "slow", lambda: False)


def planned(name: str, dtype: torch.dtype, **options: Any) -> Plan:
    method, rules, config = PLANS[name]
    options = {"micro_batch": 2, "block_tokens": 24, "checkpointing": False, **options}
    return peak_of_training(skeleton(config), method, parse_rules(rules), dtype=dtype, **options)


def nbytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name", PLANS)
def test_planned_bytes_are_those_of_the_model(name: str) -> None:
    """Contract 7: codes, float parameters, adapters, gradients, moments of AdamW, and what backward keeps."""
    method, rules, config = PLANS[name]
    dtype = (torch.bfloat16, torch.float32)[list(PLANS).index(name) % 2]
    plan, model = planned(name, dtype), prepare(model_of(config, dtype), method, rules)
    layers = list(quant_layers(model).values())
    assert plan.codes == sum(layer.base.stored_bytes() for layer in layers if not tied(layer)) + nbytes(
        layer.bias for layer in layers if isinstance(layer, QuantLinear) and layer.bias is not None
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = {id(p) for layer in layers for p in layer.parameters()}
    assert plan.float_parameters == nbytes(p for p in model.parameters() if id(p) not in ours)
    assert plan.trainable == sum(p.numel() for p in trained)
    assert plan.adapters == nbytes(trained)
    assert plan.codes + plan.float_parameters + plan.adapters == nbytes(model.parameters())
    assert plan.activations == kept_for_backward(model, 2, 24)
    if not trained:
        assert (plan.gradients, plan.optimizer) == (0, 0)
        return
    optimizer = torch.optim.AdamW(trained)
    model(torch.zeros(1, 4, dtype=torch.int64)).logits.float().square().mean().backward()
    assert plan.gradients == nbytes(p.grad for p in trained)
    optimizer.step()
    moments = [v for state in optimizer.state.values() for v in state.values() if v.dim() > 0]
    assert plan.optimizer == nbytes(moments)


def tied(layer: Any) -> bool:
    return isinstance(layer, QuantLinear) and layer.tied


def test_every_method_is_planned() -> None:
    from trimtab.methods import ALL

    assert {type(method) for method, _, _ in PLANS.values()} == set(ALL)


def test_planning_leaves_a_skeleton() -> None:
    """Nothing with data is made, and no hook of the prediction is left behind."""
    method, rules, config = PLANS["lr-qat"]
    model = skeleton(config)
    peak_of_training(
        model, method, parse_rules(rules), micro_batch=1, block_tokens=8, dtype=torch.bfloat16, checkpointing=False
    )
    assert all(p.is_meta for p in model.parameters())
    assert len(quant_layers(model)) == 7 * 2 + 2
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_plan_adds_up() -> None:
    plan = planned("lr-qat", torch.bfloat16)
    parts = ("codes", "float_parameters", "adapters", "gradients", "optimizer", "activations", "temporary")
    assert plan.total == sum(getattr(plan, part) for part in parts)
    assert plan.trainable == plan.adapters // 4
    longer = planned("lr-qat", torch.bfloat16, block_tokens=48)
    assert longer.activations > 1.9 * plan.activations
    recomputed = planned("lr-qat", torch.bfloat16, block_tokens=48, checkpointing=True)
    assert recomputed.activations < longer.activations
    assert recomputed.codes == longer.codes == plan.codes


def test_moments_in_eight_bits_are_planned_in_eight_bits(tmp_path: Path) -> None:
    """Two moments of each trained number: a byte each, or four."""
    tiny.model(tmp_path / "model")
    tiny.text(tmp_path / "data.jsonl")
    for optimizer, moment in {"adamw": 4, "adamw-8bit": 1}.items():
        changes = {"train": {"optimizer": optimizer}}
        parsed = from_dict(tiny.recipe(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", **changes))
        found = plan(parsed, open_source(parsed.model.path).layout(dtype=parsed.dtype))
        assert found.trainable > 0
        assert found.optimizer == 2 * moment * found.trainable, optimizer


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_micro_batch_peaks_where_most_is_there_at_once(name: str, checkpointing: bool) -> None:
    """A maximum over the loss and the layers of backward, gone through one by one."""
    both = planned(name, torch.bfloat16, checkpointing=checkpointing, micro_batches=2)
    one = planned(name, torch.bfloat16, checkpointing=checkpointing, micro_batches=1)
    assert (both.apart, one.total + one.apart) == (0, both.total)
    fixed = one.codes + one.float_parameters + one.adapters + one.optimizer
    assert fixed + max(one.activations, one.gradients) <= one.total <= both.total
    # With far more activations than gradients, when backward begins: nearly all of the gradients are not there yet.
    long = planned(name, torch.bfloat16, checkpointing=checkpointing, micro_batches=1, block_tokens=2048)
    method, rules, config = PLANS[name]
    model = prepare(model_of(config, torch.bfloat16), method, rules)
    head, last = (
        nbytes(p for p in part.parameters() if p.requires_grad)
        for part in (model.get_output_embeddings(), model.base_model.layers[-1])
    )
    assert one.gradients - head - last <= long.apart <= one.gradients - head


BUFFER, TOKENS = 64 * 96 * 2, 48
# name -> bytes of the shared buffers, and floats of a layer's levels
TEMPORARY = {
    "lora": (0, 0),
    "qlora": (BUFFER, 0),
    "qa-lora": (BUFFER, 0),
    "peqa": (2 * BUFFER, 0),  # W and dL/dW
    "lr-qat": (2 * BUFFER, 0),  # a head made from codes shares the buffer
    "lr-qat, head": (BUFFER, 64 * 96 * (3 * 4 + 1 + 4 * 2)),  # float levels: only dL/dW
    "qat": (BUFFER, 64 * 96 * (4 * 4 + 1 + 4 * 2)),  # only dL/dW
}


@pytest.mark.parametrize("name", TEMPORARY)
def test_temporary_is_the_shared_buffers_and_the_larger_moment(name: str) -> None:
    """The loss (logits and their exponentials, twice the hidden states) or one layer (and its widest activations)."""
    buffers, levels = TEMPORARY[name]
    trained_head = name not in ("lora", "lr-qat")  # then all logits are there, and their gradient
    loss = (2 if trained_head else 1) * TOKENS * 96 * 8 + 2 * TOKENS * 64 * 2
    assert planned(name, torch.bfloat16).temporary == buffers + max(loss, levels + 2 * TOKENS * 96 * 2)


def test_recomputed_blocks_are_not_there_in_the_loss() -> None:
    """What a block keeps is in `activations`; the logits of its absence are counted only beyond that."""
    kept, recomputed = (planned("qlora", torch.bfloat16, checkpointing=c) for c in (False, True))
    block = kept.activations // 2
    assert recomputed.activations == block + 2 * TOKENS * 64 * 2
    loss = 2 * TOKENS * 96 * 8 + 2 * TOKENS * 64 * 2  # the head is trained: all logits and their gradient
    assert recomputed.temporary == BUFFER + max(loss - block, 2 * TOKENS * 96 * 2)


# ---- what backward keeps -------------------------------------------------------------------------------------------

KEPT: dict[str, tuple[Method, dict[str, Any]]] = {
    "lr-qat": (LrQat(rank=4), INTEGER),
    "qlora": (Qlora(rank=4), NF4),
    "qa-hira": (QaHira(), REAL),
}


def prepared_meta(config: PreTrainedConfig, method: Method, rule: dict[str, Any], dtype: torch.dtype) -> Any:
    model = skeleton(config).eval()
    cast_floats(model, dtype)
    prepare_meta(model, method, parse_rules([rule]))
    return model


@pytest.mark.parametrize("config", [LLAMA, QWEN, GEMMA], ids=lambda c: c.model_type)
@pytest.mark.parametrize("name", KEPT)
def test_kept_for_backward_is_what_a_real_forward_keeps(name: str, config: PreTrainedConfig) -> None:
    """Counted again here, by address; Gemma beyond its sliding window."""
    (method, rule), dtype = KEPT[name], torch.float32 if config is QWEN else torch.bfloat16
    real, meta = prepare(model_of(config, dtype), method, [rule]), prepared_meta(config, method, rule, dtype)
    kept, held = dict[int, int](), list[Tensor]()
    parameters = {p.untyped_storage().data_ptr() for p in real.parameters()}

    def pack(t: Tensor) -> Tensor:
        held.append(t)  # alive, so that no address is used twice
        if t.untyped_storage().data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    training = config is LLAMA
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        real.train(training).base_model(torch.zeros(2, 40, dtype=torch.int64), use_cache=False)
    expected = sum(kept.values())
    assert expected > 2 * 40 * 64 * dtype.itemsize
    assert kept_for_backward(meta.train(training), 2, 40) == pytest.approx(expected, rel=0.02)


def test_frozen_layers_keep_no_inputs() -> None:
    """QA-HiRA keeps sums of groups where LR-QAT keeps inputs: at 256 tokens it must come to less."""
    kept = {n: kept_for_backward(prepared_meta(LLAMA, *KEPT[n], torch.bfloat16), 1, 256) for n in KEPT}
    assert kept["qa-hira"] < kept["lr-qat"]
    inputs = 2 * 256 * sum(64 + 64 + 64 + 96 for _ in range(2))  # into q, k, v; o; gate, up; down
    assert kept["lr-qat"] - kept["qa-hira"] < 2 * inputs


# ---- what is resident ----------------------------------------------------------------------------------------------

MB = 1 << 20
linux = pytest.mark.skipif(not process._CLEAR.exists(), reason="needs Linux's clear_refs")


@linux
def test_a_peak_is_seen_and_forgotten() -> None:
    process.reset_peak()
    before = process.peak_bytes()
    block = torch.ones(50 * MB, dtype=torch.uint8)
    assert 48 * MB < process.peak_bytes() - before < 60 * MB
    del block
    assert process.peak_bytes() - before > 48 * MB
    process.reset_peak()
    assert process.peak_bytes() - before < 5 * MB


@linux
def test_resident_memory_comes_and_goes() -> None:
    before = process.resident_bytes()
    block = torch.ones(50 * MB, dtype=torch.uint8)
    assert 48 * MB < process.resident_bytes() - before < 60 * MB
    del block
    assert abs(process.resident_bytes() - before) < 5 * MB


@linux
def test_mapped_files_are_not_resident_memory(tmp_path: Path) -> None:
    """Pages of a file that is only read can be dropped at any time."""
    (tmp_path / "file").write_bytes(bytes(50 * MB))
    before = process.resident_bytes()
    mapped = torch.from_file(str(tmp_path / "file"), size=50 * MB, dtype=torch.uint8)
    assert mapped.sum() == 0
    assert process.resident_bytes() - before < 5 * MB


def test_available_memory_is_plausible() -> None:
    available = process.available_bytes()
    assert available is None or 0 < available < 1 << 50


def test_the_measurements_kept_hold_every_method_on_two_models() -> None:
    kept = Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json"
    rows = json.loads(kept.read_text())["rows"]
    measured = {(r["name"], r["model"], r["checkpointing"]): r["ratio"] for r in rows}
    for name in (m.name for m in methods.ALL if m.name not in ("rtn", "loftq")):  # LoftQ trains as QLoRA does
        for model, recomputed in product(("llama", "qwen2"), (False, True)):
            assert 0.9 < measured[name, model, recomputed] < 1.1, (name, model, recomputed)


@linux
@pytest.mark.parametrize("more", [[], ["--single"]])
def test_a_plan_is_what_training_takes(tmp_path: Path, more: list[str]) -> None:
    """Three ways to train a weight, with and without recomputed blocks; the benchmark has every method."""
    benchmark, out = Path(__file__).parents[2] / "benchmarks" / "memory" / "memory.py", tmp_path / "memory.json"
    command = [sys.executable, str(benchmark), "--once", "--models", "small", "--out", str(out)]
    done = subprocess.run(
        [*command, *more, "--rows", "qlora", "lr-qat", "qat"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ratios = {(r["name"], r["checkpointing"]): r["ratio"] for r in json.loads(out.read_text())["rows"]}
    assert len(ratios) == 6
    assert all(0.9 < ratio < 1.1 for ratio in ratios.values()), ratios


# ---- loading --------------------------------------------------------------------------------------------------------

LAYERS, WIDTH, MLP = 12, 1024, 2048

LOAD = """
import sys, threading, time
import torch
torch.set_num_threads(1)
from trimtab.memory import process
from trimtab.models.load import load
from trimtab.models.transformers_bridge import quant_layers
from trimtab.methods import Rtn

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, process.resident_bytes())

load(sys.argv[1], Rtn())  # what is made once, at the first load
peak, done, watcher = 0, threading.Event(), threading.Thread(target=watch)
before = process.resident_bytes()
watcher.start()
model, _ = load(sys.argv[2], Rtn())
done.set()
watcher.join()
packed = sum(p.nbytes for p in model.parameters())
largest = 4 * max(layer.base.shape[0] * layer.base.shape[1] for layer in quant_layers(model).values())
print(peak - before, process.resident_bytes() - before, packed, largest)
"""


def write(path: Path, layers: int, width: int, mlp: int) -> Path:
    """A bfloat16 model, written a file for each layer; all layers are alike."""
    LlamaConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    shapes = {f"self_attn.{n}_proj": (width, width) for n in "qkvo"}
    shapes |= {"mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp)}
    layer = {f"{n}.weight": torch.randn(shape).mul_(0.02).bfloat16() for n, shape in shapes.items()}
    layer |= {f"{n}_layernorm.weight": torch.ones(width).bfloat16() for n in ("input", "post_attention")}
    for i in range(layers):
        save_file({f"model.layers.{i}.{n}": tensor for n, tensor in layer.items()}, path / f"model-{i}.safetensors")
    ends = {"model.embed_tokens.weight": torch.randn(300, width).bfloat16(), "model.norm.weight": torch.ones(width)}
    save_file(ends, path / "model-ends.safetensors")
    return path


@pytest.fixture
def wide(tmp_path: Path) -> Iterator[Path]:
    """A model of 250 MB, deleted at once: pytest would keep it."""
    yield write(tmp_path / "wide", LAYERS, WIDTH, MLP)
    shutil.rmtree(tmp_path / "wide")


@linux
def test_peak_memory_is_the_packed_model_and_one_float_layer(wide: Path, tmp_path: Path) -> None:
    """One layer means its temporaries: its levels, codes and their like, at most seven times its float32 weight at once."""
    command = [sys.executable, "-c", LOAD, str(write(tmp_path / "warm", 1, 64, 64)), str(wide)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peak, after, packed, largest = map(int, done.stdout.split())
    in_bfloat16 = 2 * LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * MLP)
    slack = 8 << 20
    assert packed < 0.3 * in_bfloat16
    assert after < packed + slack
    assert peak < packed + 7 * largest + slack
    assert peak < 0.6 * in_bfloat16
