"""PEFT LoRA files, with peft as the oracle, in both directions."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import trimtab as tt
from exported import EMBEDDING, IDS, everywhere, linears, llama, logits, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.evaluation import serving
from trimtab.layers.adapters import DeltaOutput
from trimtab.methods import Lora, LrQat, Method, QaBlora, QaHira, QaLora, QBara, Qlora
from trimtab.models.peft_init import FREE, start_from

NF4 = everywhere(codebook="nf4", group=32)
REAL = everywhere(bits=4, group=16, zero="real", scale_dtype="float32")
CASES: dict[str, tuple[Method, list[dict[str, Any]]]] = {
    "lora": (Lora(rank=4, alpha=8.0), [everywhere(bits=4, group=32)]),
    "qlora": (Qlora(rank=4, alpha=8.0), [EMBEDDING, NF4]),
    "q-bara": (QBara(rank=4, alpha=8.0), [NF4]),
    "qa-lora": (QaLora(rank=4), [REAL]),
    "qa-blora": (QaBlora(rank=4, repeat=2), [NF4]),
    "qa-hira": (QaHira(), [REAL]),
    "some": (Qlora(rank=4), [{"match": "*.0.mlp.*", "grid": None}, NF4]),
}


def reloaded(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(tmp_path: Path, name: str) -> None:
    method, rules = CASES[name]
    model = prepared(*rules, method=method, dtype=torch.float32)
    shake(model)
    report = write(model, "peft", tmp_path / "out")
    assert report.kind == "exact"
    ours, base = logits(model), tensors(tmp_path / "out/base")
    assert all(torch.equal(base[f"{n}.weight"], x.base.dequantize(torch.float32)) for n, x in linears(model).items())
    theirs = logits(reloaded(tmp_path / "out"))
    untuned = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out/base"))
    moved = (ours - untuned).abs().max()
    assert moved > 0.05
    assert (ours - theirs).abs().max() < 2e-4 * moved


def test_parity_takes_adapter_and_base(tmp_path: Path) -> None:
    """The engine's side of `trimtab parity`, in a process of its own."""
    model = prepared(NF4, method=QBara(rank=4, alpha=8.0), dtype=torch.float32)
    shake(model)
    write(model, "peft", tmp_path / "out")
    served = serving.engine_logprobs(tmp_path / "out", "transformers", IDS, sys.executable)
    assert (served - serving.model_logprobs(model, IDS)).abs().max() < 1e-4
    base = serving.engine_logprobs(tmp_path / "out/base", "transformers", IDS, sys.executable)
    assert (served - base).abs().max() > 0.05


def test_ranks_that_differ(tmp_path: Path) -> None:
    """QA-HiRA's rank is K / p: down_proj has twice the inputs."""
    model = prepared(REAL, method=QaHira(), dtype=torch.float32)
    write(model, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 4
    assert set(config["rank_pattern"].values()) == {8}
    assert sorted(config["rank_pattern"]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_factors_are_stored_as_they_act(tmp_path: Path) -> None:
    model = prepared(NF4, method=QBara(rank=4, alpha=8.0))
    shake(model)
    write(model, "peft", tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, layer in linears(model).items():
        assert isinstance(layer.adapter, DeltaOutput)
        a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == torch.bfloat16
        assert torch.allclose(b.double() @ a.double() * 8 / 4 / 2, layer.adapter.delta.dense().double(), atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    integer = prepared(everywhere(bits=4, group=16, zero="integer"), method=QaHira())
    with pytest.raises(UserError, match=r"q_proj: rounds its update to integer zeros.*`zero: real`"):
        write(integer, "peft", tmp_path / "out")
    tt.fold(integer)
    with pytest.raises(UserError, match="keeps no adapter"):
        write(integer, "peft", tmp_path / "out")
    with pytest.raises(UserError, match="trained in its codes"):
        write(prepared(everywhere(bits=4, group=16), method=LrQat(rank=2)), "peft", tmp_path / "out")


@pytest.mark.parametrize("rslora", [False, True])
def test_start_from_peft(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        alpha_pattern={} if rslora else {"layers.1.mlp.down_proj": 20}, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(llama(dtype=torch.float32), config).eval()
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16().float()
    wrapped.save_pretrained(tmp_path / "lora")
    rules = [{"match": p, "grid": "float"} for p in ("*q_proj", "*down_proj")] + [{"match": "*", "grid": None}]
    model = tt.prepare(llama(dtype=torch.float32), Lora(rank=4, alpha=4.0), rules)
    start_from(model, str(tmp_path / "lora"))
    with torch.no_grad():
        theirs = wrapped(IDS).logits
    assert (logits(model) - theirs).abs().max() < 2e-2 * (theirs - logits(llama(dtype=torch.float32))).abs().max()
    other = prepared(NF4, method=Qlora(rank=8))
    with pytest.raises(UserError, match=r"set method.rank to 4"):
        start_from(other, str(tmp_path / "lora"))
    with pytest.raises(UserError, match=r"has no low-rank output adapter"):
        start_from(prepared(everywhere(bits=4, group=32), method=LrQat(rank=4)), str(tmp_path / "lora"))
    with pytest.raises(UserError, match="no such file"):
        start_from(other, str(tmp_path))


# ---- what is not a plain LoRA -------------------------------------------------------------------------------------------

RULES = [{"match": "*q_proj", "grid": "float"}, {"match": "*", "grid": None}]


def saved(folder: Path, **options: Any) -> Path:
    """An adapter of the attention's queries, as PEFT saves it after a step that moved it."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        llama(dtype=torch.float32), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    )
    wrapped.peft_config["default"].init_lora_weights = True  # as PEFT's own documentation has it
    wrapped.save_pretrained(folder / "start")
    wrapped.peft_config["default"].init_lora_weights = options.get("init_lora_weights", True)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data += 0.02 * torch.randn_like(p)
    wrapped.save_pretrained(folder / "lora")
    if str(options.get("init_lora_weights")).startswith(("pissa", "olora")):
        wrapped.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "start"))
    return folder


def started(folder: Path, rank: int = 4) -> Any:
    method = Lora(rank=rank, adapter_dtype="float32")
    model = tt.prepare(llama(dtype=torch.float32), method, RULES)
    start_from(model, str(folder))
    return model


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model:UserWarning")
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_changed_the_base_is_refused_and_its_conversion_is_not(tmp_path: Path, start: str) -> None:
    """PEFT starts that change the base: the factors alone gave logits off by 6.4."""
    saved(tmp_path, init_lora_weights=start)
    with pytest.raises(UserError, match=rf"init_lora_weights is '{start}'.*path_initial_model_for_weight_conversion"):
        started(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path / "converted")
    ours = started(tmp_path / "converted", rank=8)
    moved = (logits(theirs) - logits(llama(dtype=torch.float32))).abs().max()
    assert moved > 0.05
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-4 * moved


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_a_start_that_leaves_the_base_is_taken(tmp_path: Path, start: Any) -> None:
    saved(tmp_path, init_lora_weights=start, lora_dropout=0.1, exclude_modules=["k_proj"])
    theirs = peft.PeftModel.from_pretrained(llama(dtype=torch.float32), tmp_path / "lora")
    moved = (logits(theirs) - logits(llama(dtype=torch.float32))).abs().max()
    assert (logits(started(tmp_path / "lora")) - logits(theirs)).abs().max() < 1e-4 * moved


def change(folder: Path, **values: Any) -> Path:
    settings = folder / "lora/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | values))
    return folder / "lora"


ODD: dict[str, Any] = {"bias": "all", "init_lora_weights": "eva"}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(peft.LoraConfig)] + ["of_a_newer_peft"])
def test_every_field_of_peft_is_known_to_be_harmless_or_refused(tmp_path: Path, field: str) -> None:
    """Walks over the installed LoraConfig, so that no field of a newer one slips in."""
    saved(tmp_path)
    started(tmp_path / "lora")  # with every field at its default
    folder = change(tmp_path, **{field: ODD.get(field, {"a": 1})})
    if field in FREE:
        assert field in {
            *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "peft_type"),
            *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode"),
            *("runtime_config", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
            *("megatron_core", "qalora_group_size", "fan_in_fan_out"),
        }
        return
    with pytest.raises(UserError, match=rf"adapter_config\.json: {field} is .*not a plain LoRA.*merge_and_unload"):
        started(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [1]},
        {"lora_bias": True},
        {"use_qalora": True},
        {"target_parameters": ["experts.weight"]},
        {"init_lora_weights": "loftq"},
    ],
    ids=str,
)
def test_what_is_no_plain_lora_is_refused_by_its_name(tmp_path: Path, values: dict[str, Any]) -> None:
    saved(tmp_path)
    with pytest.raises(UserError, match=f"{next(iter(values))} is "):
        started(change(tmp_path, **values))


def test_tensors_and_ranks_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "lora/adapter_model.safetensors"
    whole = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.weight"
    save_file(whole | {name: torch.ones(4)}, file)
    with pytest.raises(UserError, match=r"lora_magnitude_vector\.weight is not a factor"):
        started(tmp_path / "lora")
    save_file(whole | {next(iter(whole)): torch.full((4, 64), torch.nan)}, file)
    with pytest.raises(UserError, match="holds NaN"):
        started(tmp_path / "lora")
    save_file(whole, file)
    model = tt.prepare(llama(dtype=torch.float32), Lora(rank=4), RULES)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"have rank 4, adapter_config\.json says 8"):
        start_from(model, str(change(tmp_path, rank_pattern={"layers.1.self_attn.q_proj": 8})))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()), "a refusal leaves the model as it was"


def test_our_own_adapter_is_read_by_us_and_by_peft(tmp_path: Path) -> None:
    model = tt.prepare(llama(dtype=torch.float32), Lora(rank=4, alpha=8.0), RULES)
    shake(model)
    write(model, "peft", tmp_path / "out")
    assert (logits(reloaded(tmp_path / "out")) - logits(model)).abs().max() < 1e-4
    again = tt.prepare(llama(dtype=torch.float32), Lora(rank=4, alpha=8.0), RULES)
    start_from(again, str(tmp_path / "out"))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("value", [7, ["q_proj"], {"(": 4}, {"(a+)+$": 4}, {"(.*)*x": 4}, {"x" * 2000: 4}])
def test_patterns_that_are_none(tmp_path: Path, key: str, value: Any) -> None:
    """Nor is one looked for that would be sought for ever."""
    write(prepared(EMBEDDING, NF4, method=Qlora(rank=4), dtype=torch.float32), "peft", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()  # as of somebody else, of whom nothing says what was written
    file = tmp_path / "out" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    model = prepared(EMBEDDING, NF4, method=Qlora(rank=4), dtype=torch.float32)
    with pytest.raises(UserError, match=rf"adapter_config\.json: {key} is not a mapping of patterns"):
        start_from(model, str(tmp_path / "out"))


def test_factors_beyond_bfloat16(tmp_path: Path) -> None:
    """Finite in float32, and infinite where ours are kept."""
    write(prepared(EMBEDDING, NF4, method=Qlora(rank=4), dtype=torch.float32), "peft", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    file = tmp_path / "out" / "adapter_model.safetensors"
    stored = {name: tensor.float() for name, tensor in load_file(file).items()}
    next(iter(stored.values()))[0, 0] = torch.finfo(torch.float32).max
    save_file(stored, file)
    model = prepared(EMBEDDING, NF4, method=Qlora(rank=4), dtype=torch.float32)
    with pytest.raises(UserError, match="numbers beyond bfloat16"):
        start_from(model, str(tmp_path / "out"))
