"""Rounded activations and a simulated KV cache in whole models: packed, padded, generated, planned, saved and run."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from test_reload import EMBEDDING, RELOAD, child, everywhere, llama, logits, shake
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.layers.linear import QuantLinear
from trimtab.memory.peak import _in_layer, kept_for_backward, peak_of_training
from trimtab.methods import Lora, LrQat, Method, QaHira, Qat, Rtn
from trimtab.models.kv_cache import current, install
from trimtab.models.transformers_bridge import TrimtabConfig, TrimtabQuantizer, quant_layers
from trimtab.pipeline.run import run
from trimtab.recipe import recipe
from trimtab.recipe.rules import parse_rules

INT4 = [EMBEDDING, everywhere(bits=4, group=32, zero="integer")]
REAL = [everywhere(bits=4, group=16, zero="real")]
# What each name stands for: activations, KV cache.
SETTINGS: dict[str, tuple[tt.Activations | None, tt.KvCache | None]] = {
    "w4a8": (tt.Activations(8), None),
    "w4a8kv8": (tt.Activations(8), tt.KvCache(8)),
    "w4a8kv4": (tt.Activations(8, mode="static"), tt.KvCache(4, symmetric=True)),
    "w4a4kv4": (tt.Activations(4, symmetric=True), tt.KvCache(4)),
    "w4kv4": (None, tt.KvCache(4)),
}
CALIBRATION = torch.arange(48).view(3, 16) * 7 % 64
every_setting = pytest.mark.parametrize("name", SETTINGS)


def prepared(
    setting: str, method: Method | None = None, rules: Any = INT4, *, tied: bool = True, dtype: Any = torch.float32
) -> PreTrainedModel:
    activations, kv = SETTINGS[setting]
    model = tt.prepare(llama(tied=tied, dtype=dtype), method or LrQat(rank=4), rules)
    tt.simulate(model, activations=activations, kv=kv, calibration=CALIBRATION)
    return model


def linears(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {n: m for n, m in quant_layers(model).items() if isinstance(m, QuantLinear)}


# ---- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_attention_on_rounded_keys_and_values_is_that_of_the_equations(bits: Any, symmetric: bool) -> None:
    """softmax(q k_hat^T / sqrt(d)) v_hat and its gradients, written out in float64; two queries share a head of keys."""
    model, kv = prepared("w4a8"), tt.KvCache(bits, symmetric)
    install(model, kv)
    module = model.model.layers[0].self_attn
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 6, 16, requires_grad=True) for heads in (2, 1, 1))
    g = torch.randn(1, 6, 2, 16)
    out, _ = AttentionInterface()[model.config._attn_implementation](module, q, k, v, None, scaling=0.25)
    out.backward(g)

    hats, inside = [], []
    for t in (k.detach(), v.detach()):
        low, high = t.amin(-1, keepdim=True), t.amax(-1, keepdim=True)
        top = 2 ** (bits - 1) - 1
        s = torch.maximum(high, -low) / top if symmetric else (high - low) / (2**bits - 1)
        z = torch.zeros_like(s) if symmetric else (-top - 1 - low / s).round()
        u = (t / s + z).round()
        hats.append((u.clamp(-top - 1, top) - z).double() * s)
        inside.append((u <= top) & (u >= -top - 1))
    q64, g64, (k_hat, v_hat) = q.detach().double(), g.double().transpose(1, 2), hats
    scores = q64 @ k_hat.mT * 0.25
    weights = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1)
    torch.testing.assert_close(out.detach().double(), (weights @ v_hat).transpose(1, 2), rtol=1e-5, atol=1e-6)
    of_weights = g64 @ v_hat.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * 0.25
    of_k, of_v = (of_scores.mT @ q64).sum(1, keepdim=True), (weights.mT @ g64).sum(1, keepdim=True)
    for t, exact in ((q, of_scores @ k_hat), (k, of_k * inside[0]), (v, of_v * inside[1])):
        assert t.grad is not None
        torch.testing.assert_close(t.grad.double(), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("inner", ["sdpa", "eager"])
def test_packed_documents_do_not_attend_to_each_other(inner: str) -> None:
    model = prepared("w4a8")
    model.set_attn_implementation(inner)
    tt.simulate(model, kv=tt.KvCache(8))
    first, second = torch.arange(1, 6), torch.arange(20, 27)
    packed, positions = torch.cat([first, second])[None], torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=False).logits[0]
        apart = [model(ids[None], use_cache=False).logits[0] for ids in (first, second)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)
    assert current(model) == tt.KvCache(8)


def test_both_kinds_of_attention_are_one_simulation() -> None:
    model = prepared("w4kv4")
    with_sdpa = logits(model)
    model.set_attn_implementation("eager")
    float_cache = logits(model)
    tt.simulate(model, kv=tt.KvCache(4))
    assert model.config._attn_implementation.endswith("eager")
    torch.testing.assert_close(logits(model), with_sdpa, rtol=1e-4, atol=1e-4)
    assert (float_cache - with_sdpa).norm() > 1e-2 * with_sdpa.norm()


@every_setting
def test_padding_and_batch_do_not_matter(name: str) -> None:
    model = prepared(name)
    ids = torch.arange(3, 12)[None]
    other = torch.arange(40, 55)[None]
    batch = torch.cat([torch.nn.functional.pad(ids, (6, 0), value=1), other])
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    with torch.no_grad():
        alone = model(ids).logits
        among = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(among[:1, 6:], alone, rtol=1e-4, atol=1e-4)


@every_setting
def test_generation_from_a_cache_reads_what_a_full_pass_reads(name: str) -> None:
    model = prepared(name)
    shake(model)
    tt.fold(model)
    start = torch.arange(2, 9)[None]
    made: Any = model.generate(
        start, max_new_tokens=10, min_new_tokens=10, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        full = model(made.sequences, use_cache=False).logits[:, start.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), full, rtol=1e-4, atol=1e-4)


# ---- a model -------------------------------------------------------------------------------------------------------


def test_which_inputs_are_rounded() -> None:
    """Those of linear layers with a low-bit weight; not the head's, tied or not, nor a float layer's."""
    rules = [{"match": "*.down_proj", "grid": "float"}, everywhere(bits=4, group=32)]
    for tied in (True, False):
        model = tt.prepare(llama(tied=tied), Lora(rank=2), [EMBEDDING, *rules])
        tt.simulate(model, activations=tt.Activations(8))
        having = {n for n, layer in linears(model).items() if layer.inputs is not None}
        assert having == {n for n in linears(model) if "down" not in n and "lm_head" not in n}


def test_the_start_is_the_rounded_model_on_rounded_activations() -> None:
    for setting in ("w4a8kv8", "w4a8kv4"):
        start = logits(prepared(setting, Rtn()))
        for method in (LrQat(rank=4), Qat()):
            assert torch.equal(logits(prepared(setting, method)), start)
        assert not torch.equal(start, logits(tt.prepare(llama(tied=True), Rtn(), INT4)))


def test_fewer_bits_are_further_away() -> None:
    plain = logits(tt.prepare(llama(tied=True), Rtn(), INT4))
    error = {
        n: ((logits(prepared(n, Rtn())) - plain).norm() / plain.norm()).item() for n in ("w4a8", "w4a8kv8", "w4a4kv4")
    }
    assert 0 < error["w4a8"] < error["w4a8kv8"] < error["w4a4kv4"] < 1


def test_static_ranges_are_those_of_the_calibration_tokens() -> None:
    model = tt.prepare(llama(tied=True), LrQat(rank=4), INT4)
    seen: dict[str, list[Tensor]] = {n: [] for n in linears(model)}
    hooks = [m.register_forward_pre_hook(lambda _, a, n=n: seen[n].append(a[0])) for n, m in linears(model).items()]
    with torch.no_grad():
        model(CALIBRATION)
    for hook in hooks:
        hook.remove()
    tt.simulate(model, activations=tt.Activations(8, mode="static"), calibration=CALIBRATION)
    for name, layer in linears(model).items():
        if layer.inputs is None:
            assert name == "lm_head"
            continue
        x = torch.cat([t.flatten() for t in seen[name]])
        assert layer.inputs.scale is not None
        assert layer.inputs.zero is not None
        scale = (x.max() - x.min()) / 255
        torch.testing.assert_close(layer.inputs.scale, scale.view(1), rtol=1e-5, atol=0)
        assert abs(layer.inputs.zero.item() - (-128 - x.min() / scale).item()) < 0.51
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapter." in n
    }


def test_copies_keep_the_simulation() -> None:
    model = prepared("w4a4kv4")
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), logits(model))
    assert current(other) == tt.KvCache(4)


def test_what_is_trained_moves() -> None:
    model = prepared("w4a4kv4")
    model.train()
    model.activation_checkpointing_enable()
    loss = model(input_ids=CALIBRATION, labels=CALIBRATION, use_cache=False).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert grads
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.isfinite().all()
        assert name.endswith("delta.A") or grad.norm() > 0, name  # B starts at zero
    plain = prepared("w4a4kv4")
    plain.train()
    again = plain(input_ids=CALIBRATION, labels=CALIBRATION, use_cache=False).loss
    again.backward()
    assert torch.equal(loss, again)
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name])


def test_merging_an_adapter_that_reads_other_inputs_is_refused() -> None:
    model = prepared("w4a8", Lora(rank=2))
    assert {f.action for f in tt.fold(model)} == {"kept"}
    with pytest.raises(UserError, match=r"q_proj: its adapter reads inputs .*merge: false"):
        tt.fold(model, merge=True)
    assert all(layer.adapter is not None for n, layer in linears(model).items() if n != "lm_head")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"static ranges are measured on tokens"),
        ({"calibration": CALIBRATION[:0]}, r"static ranges are measured on tokens"),
    ],
)
def test_static_without_tokens(change: dict[str, Any], message: str) -> None:
    model = tt.prepare(llama(tied=True), LrQat(rank=4), INT4)
    with pytest.raises(UserError, match=message):
        tt.simulate(model, activations=tt.Activations(8, mode="static"), **change)
    assert all(layer.inputs is None for layer in linears(model).values())


def test_nothing_to_round_is_said() -> None:
    with pytest.raises(UserError, match="not prepared"):
        tt.simulate(llama(tied=True), kv=tt.KvCache(8))
    model = tt.prepare(llama(tied=False), Lora(rank=2), None)
    with pytest.raises(UserError, match="no linear layer has a low-bit weight"):
        tt.simulate(model, activations=tt.Activations(8))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="'flex_attention', and only sdpa and eager"):
        tt.simulate(model, kv=tt.KvCache(8))
    with pytest.raises(UserError, match=r"kv.bits: 3"):
        tt.KvCache(3)  # type: ignore[arg-type]


# ---- saved ---------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[str, Method, Any, bool, torch.dtype]] = {
    "lr-qat-w4a8kv8": ("w4a8kv8", LrQat(rank=4), INT4, True, torch.bfloat16),
    "lr-qat-w4a8kv4": ("w4a8kv4", LrQat(rank=4), INT4, True, torch.float32),
    "qa-hira-w4a4kv4": ("w4a4kv4", QaHira(), REAL, False, torch.float32),
    "qat-w4kv4": ("w4kv4", Qat(), REAL, False, torch.float32),
    "lora-w4a8": ("w4a8", Lora(rank=4), INT4, True, torch.float32),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model saved as trained and as folded, and what a fresh process says of them."""
    root = tmp_path_factory.mktemp("simulated")
    made: dict[str, Any] = {"root": root}
    for name, (setting, method, rules, tied, dtype) in MODELS.items():
        model = prepared(setting, method, rules, tied=tied, dtype=dtype)
        shake(model)
        for stage in ("trained", "folded"):
            folder = root / f"{name}-{stage}"
            tt.save(model, folder)
            (folder / "expected").mkdir()
            made[folder.name] = logits(model)
            save_file({"logits": made[folder.name]}, folder / "expected" / "logits.safetensors")
            tt.fold(model)
    process = child(RELOAD, [str(p) for p in sorted(root.iterdir())])
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0, error[-3000:]
    made["said"] = json.loads(out.splitlines()[-1])
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_gives_the_same_logits(name: str, saved: dict[str, Any]) -> None:
    assert torch.equal(saved[f"{name}-trained"], saved[f"{name}-folded"])
    for stage in ("trained", "folded"):
        same, wanting = saved["said"][f"{name}-{stage}"]
        assert same, stage
        assert not [n for n in wanting if "inputs" in n]


def test_a_file_says_what_it_rounds_and_which_reader_it_needs(saved: dict[str, Any]) -> None:
    config = json.loads((saved["root"] / "lr-qat-w4a8kv4-folded" / "config.json").read_text())["quantization_config"]
    assert config["kv"] == {"bits": 4, "symmetric": True}
    assert config["format_version"] == 2
    static = {"bits": 8, "symmetric": False, "mode": "static"}
    assert [spec.get("inputs") for spec in config["specs"] if "embedding" not in spec and spec["weight"]].count(
        static
    ) > 0
    plain = tt.prepare(llama(tied=True), LrQat(rank=4), INT4)
    assert plain.config.quantization_config.format_version == 1  # what is not rounded, older readers read
    with pytest.raises(UserError, match="install a newer trimtab"):
        TrimtabQuantizer(TrimtabConfig(format_version=4)).validate_environment()


def test_yesterdays_simulation_is_todays(saved: dict[str, Any]) -> None:
    """A method put on a model that rounds activations goes on rounding them, unless told otherwise."""
    model, _ = tt.load(str(saved["root"] / "lr-qat-w4a8kv4-folded"), Lora(rank=2), dtype=torch.float32)
    assert torch.equal(logits(model), saved["lr-qat-w4a8kv4-folded"])
    tt.simulate(model, activations=tt.Activations(4))
    assert current(model) == tt.KvCache(4, True)
    assert not torch.equal(logits(model), saved["lr-qat-w4a8kv4-folded"])


def test_the_attention_asked_for_is_kept_inside(saved: dict[str, Any]) -> None:
    path = saved["root"] / "qat-w4kv4-folded"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert model.config._attn_implementation == "trimtab_kv4_asymmetric_eager"
    torch.testing.assert_close(logits(model), saved["qat-w4kv4-folded"], rtol=1e-4, atol=1e-4)


# ---- planned, and run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [LrQat(rank=4), QaHira(), Lora(rank=4)], ids=lambda m: m.name)
@pytest.mark.parametrize("setting", ["w4a8kv8", "w4a8kv4"])
def test_planned_bytes_are_those_of_the_model(method: Method, setting: str) -> None:
    activations, kv = SETTINGS[setting]
    real = prepared(setting, method, REAL, tied=False, dtype=torch.bfloat16)
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(llama(tied=False).config)
    options: dict[str, Any] = {"micro_batch": 2, "block_tokens": 128, "dtype": torch.bfloat16, "checkpointing": False}
    plan = peak_of_training(empty, method, parse_rules(REAL), **options, activations=activations, kv=kv)
    assert plan.activations == kept_for_backward(real, 2, 128)
    assert plan.codes + plan.float_parameters + plan.adapters == sum(p.nbytes for p in real.parameters())
    with init_empty_weights(include_buffers=False):
        empty = AutoModelForCausalLM.from_config(llama(tied=False).config)
    plain = peak_of_training(empty, method, parse_rules(REAL), **options)
    kept = 2 * (2 * 128) * (2 * 16)  # one bool for each number of keys and values, in two layers
    with_rounding = _in_layer(real, 256, torch.bfloat16)
    for layer in linears(real).values():
        layer.inputs = None
    assert with_rounding == _in_layer(real, 256, torch.bfloat16) + 256 * 64 * (4 + 2)
    assert plan.activations >= plain.activations + kept
    if method.name == "lr-qat":  # it keeps its inputs anyway
        assert plan.activations == plain.activations + kept


def test_a_run(tmp_path: Path) -> None:
    tiny.model(tmp_path / "model")
    tiny.text(tmp_path / "data.jsonl")
    values = tiny.recipe(
        tmp_path / "model",
        tmp_path / "data.jsonl",
        tmp_path / "out",
        activations={"bits": 8, "mode": "static"},
        kv={"bits": 8},
        evaluate={"parity_tokens": 64, "baselines": ["rounded"]},
    )
    metrics = run(recipe.from_dict(values))
    assert metrics["max_logit_difference"] == 0
    assert metrics["perplexity"]["tuned"] < metrics["perplexity"]["rounded"]
    again = recipe.read(tmp_path / "out" / "recipe.yaml")
    assert (again.activations, again.kv) == (tt.Activations(8, mode="static"), tt.KvCache(8))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert current(model) == tt.KvCache(8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activations": {"bitz": 8}}, r"activations.bitz: unknown key \(did you mean 'bits'\?\)"),
        ({"activations": {"bits": 6}}, r"activations.bits: Input should be 4 or 8"),
        ({"kv": {"mode": "static"}}, r"kv.mode: unknown key; known are bits, symmetric"),
        ({"kv": 8}, r"kv: "),
        ({"activations": {"mode": "static"}}, r"data: missing; static activations are measured on it"),
        ({"activations": {"bits": 8}, "merge": True}, r"merge: an adapter beside rounded inputs fits into no weight"),
    ],
)
def test_bad_recipes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe.from_dict({"model": {"path": "x"}, "method": "rtn", "train": {"steps": 0}, **values})
