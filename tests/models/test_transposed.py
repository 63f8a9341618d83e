"""Layers that a family keeps transposed (GPT-2's Conv1D) are read, tuned, folded, saved and read again like any other.

Oracle: transformers' own model, given the matrices that ours multiplies with, turned back.
"""

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from exported import tensors
from transposed import CONFIGS, FIRST, FOUR, IDS, close, logits, plain, read, saved, shake, turned, with_other_classes
from trimtab.bit_search.space import units
from trimtab.errors import UserError
from trimtab.methods import ALL, LrQat, Peqa, Qlora, Rtn, make
from trimtab.models.adapter_files import belongs_to
from trimtab.models.calibrate import first_inputs, hidden_of
from trimtab.models.load import load_float
from trimtab.models.replaceable import layers_of
from trimtab.models.share import shares
from trimtab.models.transformers_bridge import quant_layers
from trimtab.models.transposed import as_linear
from trimtab.pruning.structures import layout

NF4: list[dict[str, Any]] = [{"match": "*", "grid": {"codebook": "nf4", "group": 64}}]
SUBMODULES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_stays_in_float_is_transformers_own(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "m", name), dtype=dtype)
    ours = load_float(str(tmp_path / "m"), dtype=dtype)
    assert torch.equal(logits(ours), logits(theirs))
    some = read(tmp_path / "m", Rtn(), [{"match": "*.c_attn", "grid": None}, *FOUR], dtype=dtype)
    left = some.get_submodule(FIRST)
    assert type(left) is Conv1D
    assert torch.equal(left.weight, theirs.get_submodule(FIRST).weight)


def test_groups_lie_along_the_inputs() -> None:
    """Rounded by hand, from the matrix as GPT-2 holds it: groups of 32 inputs, the signed extreme of each on code 0."""
    model = turned()
    held_KN = model.get_submodule("transformer.h.1.mlp.c_proj").weight.detach().clone()  # type: ignore[union-attr]
    tt.prepare(model, Rtn(), [{"match": "*", "grid": {"bits": 4, "group": 32, "scale_dtype": "float32"}}])
    groups = held_KN.view(4, 32, 32)
    extreme = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = extreme / -8
    wanted_KN = (scale * ((groups / scale + 8).round().clamp(0, 15) - 8)).view(128, 32)
    layer: Any = model.get_submodule("transformer.h.1.mlp.c_proj")
    assert (layer.in_features, layer.out_features) == (128, 32)
    assert torch.equal(layer.dequantize(torch.float32), wanted_KN.T)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_open_layer_is_on_the_same_memory(name: str) -> None:
    model = turned(name)
    module: Any = next(m for m in model.modules() if type(m) is Conv1D)
    linear: Any = as_linear(module)
    x = torch.randn(3, module.nx, dtype=torch.float64)
    assert linear.weight.data_ptr() == module.weight.data_ptr()
    close(linear.double()(x).float(), module.double()(x).float())


@pytest.mark.parametrize("method", [m.name for m in ALL])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method(name: str, method: str, tmp_path: Path) -> None:
    """Read a layer at a time or prepared in memory, trained = folded = saved = loaded = dense in transformers."""
    made = make(method)
    grid: Any = {"bits": 4, "group": 32, "zero": "real"}
    if method in ("qlora", "q-bara", "loftq"):
        grid = {"codebook": "nf4", "group": 32}
    rank = {"rank": 2} if hasattr(made, "rank") else {}
    rules = [{"match": "*", "grid": "float" if method == "lora" else grid, **rank}]
    torch.manual_seed(2)
    model = read(saved(tmp_path / "m", name), made, rules)
    torch.manual_seed(2)
    assert torch.equal(logits(model), logits(tt.prepare(turned(name), made, rules)))
    close(logits(model), logits(plain(model, name)))
    assert len(quant_layers(model)) == 8
    if method != "rtn":
        model(input_ids=IDS, labels=IDS).loss.backward()
        wanted = {n for n, p in model.named_parameters() if p.requires_grad}
        assert wanted
        assert wanted == {n for n, p in model.named_parameters() if p.grad is not None}
    shake(model)
    expected = logits(model)
    tt.fold(model)
    assert torch.equal(logits(model), expected)
    tt.save(model, tmp_path / "s")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    merged = plain(again, name)
    tt.export(tmp_path / "s", "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "dense", dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(merged))
    close(logits(theirs), expected)
    if method == "lr-qat":
        assert torch.equal(logits(tt.prepare(again, Peqa())), expected), "a base for further tuning"
        assert torch.equal(logits(read(tmp_path / "s", Peqa(), None, source=None)), expected)


def test_rules_mix_widths_and_floats(tmp_path: Path) -> None:
    """Widths, a rank, an adapter on floats, a layer left alone, and an embedding that the head is tied to."""
    rules: list[dict[str, Any]] = [
        {"match": "transformer.wte", "grid": {"bits": 8, "group": 32}},
        {"match": "*.0.attn.c_attn", "grid": {"bits": 2, "group": 16, "zero": "integer"}, "rank": 3},
        {"match": "*.1.attn.c_attn", "grid": None},
        {"match": "*.0.mlp.c_fc", "grid": {"bits": 8, "group": None}},
        *FOUR,
    ]
    folder = saved(tmp_path / "m")
    model = read(folder, LrQat(rank=2), rules)
    assert torch.equal(logits(model), logits(tt.prepare(turned(), LrQat(rank=2), rules)))
    first: Any = model.get_submodule(FIRST)
    assert (first.base.grid.bits, first.base.grid.group, first.adapter.delta.shape.rank) == (2, 16, 3)
    assert type(model.get_submodule("transformer.h.1.attn.c_attn")) is Conv1D
    head: Any = model.get_output_embeddings()
    assert head.tied
    shake(model)
    expected = logits(model)
    tt.fold(model)
    close(expected, logits(plain(model)))
    tt.save(model, tmp_path / "s")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    tt.export(tmp_path / "s", "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "dense", dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(plain(model)))


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    """Into a dense matrix, which is written as the family keeps it."""
    model = tt.prepare(turned(n_embd=64), Qlora(rank=2), NF4)
    shake(model)
    expected = logits(model)
    tt.fold(model, merge=True)
    assert (logits(model) - expected).abs().max() < 2e-2 * expected.abs().max(), "rounded once, to bfloat16"
    wanted = logits(plain(model, n_embd=64))
    tt.save(model, tmp_path / "s")
    tt.export(tmp_path / "s", "dense")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "dense", dtype=torch.float32)
    assert torch.equal(logits(theirs), wanted)


def test_an_adapter_belongs_to_the_checkpoint_as_peft_reads_it(tmp_path: Path) -> None:
    """bitsandbytes rounds each Conv1D, too, so one that stays in float is another base."""
    folder = saved(tmp_path / "m", n_embd=64)
    assert belongs_to(read(folder, Qlora(rank=2), NF4)) == str(folder)
    assert belongs_to(read(folder, Qlora(rank=2), [{"match": "*.c_fc", "grid": None}, *NF4])) is None


def test_copies_remember_it(tmp_path: Path) -> None:
    model = tt.prepare(turned(), Rtn(), FOUR)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        tt.save(twin, tmp_path / "s")
        tt.export(tmp_path / "s", "dense", overwrite=True)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / "dense", dtype=torch.float32)
        close(logits(theirs), logits(model))


@pytest.mark.parametrize("start", ["gptq", "block"])
def test_starts_that_run_the_model(start: str, tmp_path: Path) -> None:
    """The same codes while it is read and in memory, and nearer to the float model than rounding."""
    tokens = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
    how: Any = tt.Gptq(tokens=tokens) if start == "gptq" else tt.Blockwise(tokens=tokens, steps=24)
    rules = [{"match": "*", "grid": {"bits": 3, "group": 32, "zero": "integer"}}]
    folder, wanted = saved(tmp_path / "m"), logits(turned())
    model = read(folder, Rtn(), rules, start=how)
    assert torch.equal(logits(model), logits(tt.prepare(turned(), Rtn(), rules, start=how)))
    rounded = logits(tt.prepare(turned(), Rtn(), rules))
    assert (logits(model) - wanted).norm() < (rounded - wanted).norm()


def test_blocks_are_called_as_the_model_calls_them() -> None:
    """GPT-2 hands its mask on without a name; without it, a token would see those that follow."""
    model = turned(attn_implementation="eager")
    blocks = ["transformer.h.0", "transformer.h.1"]
    states, calls = first_inputs(model, blocks, IDS[:1])
    with torch.no_grad():
        wanted = model.transformer(IDS[:1], output_hidden_states=True).hidden_states
        found = hidden_of(model.get_submodule(blocks[0])(states[0], **calls[blocks[0]]))
    assert torch.equal(states[0], wanted[0])
    assert torch.equal(found, wanted[1])
    assert calls[blocks[1]]["attention_mask"] is not None


def test_arguments_without_a_name_to_go_by_are_an_error() -> None:
    """Never dropped: the block would be called otherwise than the model calls it."""
    model = turned()
    block = type(model.get_submodule("transformer.h.0"))
    odd = type("Odd", (block,), {"forward": lambda self, hidden, *rest: block.forward(self, hidden, *rest)})
    model.get_submodule("transformer.h.0").__class__ = odd
    with pytest.raises(ValueError, match="zip"):
        first_inputs(model, ["transformer.h.0"], IDS[:1])


def test_subclasses_and_look_alikes_stay_in_float() -> None:
    model = with_other_classes(turned())
    expected = logits(model)
    left = layers_of(model).left
    assert left[FIRST] == "a Conv1D, which is not a plain Conv1D"
    assert left["transformer.h.1.mlp.c_fc"] == "a Subclass, which is not a plain Conv1D"
    with pytest.raises(UserError, match=r"no layer of the model is left.*7 layers stay in float: a Subclass, which is"):
        tt.prepare(model, Rtn())
    assert torch.equal(logits(model), expected)


def test_what_was_put_on_a_layer_is_not_lost() -> None:
    model = turned()
    model.get_submodule(FIRST).register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=rf"{FIRST}: has a hook, which would be lost"):
        tt.prepare(model, Rtn(), FOUR)
    assert type(model.get_submodule(FIRST)) is Conv1D


def test_a_model_that_it_fails_on_is_left_as_it_was() -> None:
    model = turned()
    expected = logits(model)
    last: Any = model.get_submodule("transformer.h.1.mlp.c_proj")
    kept = last.weight.detach().clone()
    with torch.no_grad():
        last.weight[3, 5] = float("nan")
    with pytest.raises(UserError, match=r"transformer\.h\.1\.mlp\.c_proj\.weight"):
        tt.prepare(model, Rtn(), FOUR)
    with torch.no_grad():
        last.weight.copy_(kept)
    assert torch.equal(logits(model), expected)
    assert not quant_layers(model)
    assert all(type(model.get_submodule(f"transformer.h.{i}.{n}")) is Conv1D for i in range(2) for n in SUBMODULES)


def test_shapes_that_do_not_fit_are_said_as_they_lie(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    found = tensors(folder)
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file(found | {name: found[name].T.contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"mlp\.c_fc\.weight has shape \(128, 32\), the config says \(32, 128\)"):
        read(folder, Rtn())


def test_a_config_whose_shapes_lie_turned_is_refused(tmp_path: Path) -> None:
    tt.save(tt.prepare(turned(), Rtn(), FOUR), tmp_path / "s")
    config = json.loads((tmp_path / "s/config.json").read_text())
    shapes = [spec["weight"] for spec in config["quantization_config"]["specs"] if spec["weight"]["shape"] == [96, 32]]
    for spec in shapes:
        spec["shape"] = [32, 96]
    (tmp_path / "s/config.json").write_text(json.dumps(config))
    (tmp_path / "s/manifest.json").unlink()  # with it, a changed file is one that was not written
    with pytest.raises(UserError, match=r"c_attn the shape \(32, 96\), and the rest of config\.json \(96, 32\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "s")


def test_shares_and_the_plan_count_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trimtab"):
        model = tt.prepare(turned(), LrQat(rank=2), FOUR)
    found = shares(model)
    assert found.total == sum(p.numel() for p in turned().parameters())
    assert found.low_bit == sum(m.weight.numel() for m in turned().modules() if type(m) is Conv1D) / found.total


def test_what_it_is_not_for_is_refused_by_name() -> None:
    """Pruning and the search of widths know Llama-like decoders."""
    with pytest.raises(UserError, match=r"prune: GPT2LMHeadModel is not a plain decoder"):
        layout(turned())
    with pytest.raises(UserError, match=r"search: the model has no float decoder layers under `layers`"):
        units(turned(), "layer")
