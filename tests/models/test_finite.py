"""Numbers beyond their dtype: refused, or said, by the layer's name, instead of becoming others."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import exported
import trimtab as tt
from gguf_models import byte_level_tokenizer
from trimtab.errors import Diverged, UserError
from trimtab.evaluation import comparing, parity, serving
from trimtab.evaluation.perplexity import perplexity
from trimtab.formats import export as exporting
from trimtab.methods import LrQat, Method, Peqa, Qat, Qlora, Rtn
from trimtab.training.ours import Ours

Q = "model.layers.0.self_attn.q_proj"
GRID: dict[str, Any] = {"bits": 2, "group": 32}


def scaled(factor: float, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of which one layer is larger, or smaller."""
    model = exported.llama(dtype=dtype)
    with torch.no_grad():
        model.get_submodule(Q).weight.mul_(factor)  # type: ignore[union-attr,operator]
    return model


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize(("scale_dtype", "factor"), [("portable", 1e6), ("float16", 1e6), ("portable", 3e5)])
def test_a_scale_beyond_its_dtype_is_refused(scale_dtype: str, factor: float, zero: str) -> None:
    model = scaled(factor)
    said = rf"{Q}: its weights need scales of .* `scale_dtype: {scale_dtype}` holds none larger; set .*: bfloat16`"
    with pytest.raises(UserError, match=said):
        tt.prepare(model, Rtn(), [exported.everywhere(**GRID, zero=zero, scale_dtype=scale_dtype)])
    assert isinstance(model.get_submodule(Q), torch.nn.Linear), "put back"
    tt.prepare(model, Rtn(), [exported.everywhere(**GRID, zero=zero, scale_dtype="bfloat16")])


def test_the_same_by_gptq(caplog: pytest.LogCaptureFixture) -> None:
    start = tt.Gptq(tokens=torch.arange(64).view(2, 32) % 60)
    with pytest.raises(UserError, match=f"{Q}: its weights need scales of"):
        tt.prepare(scaled(1e6), Rtn(), [exported.everywhere(**GRID)], start=start)
    with caplog.at_level(logging.WARNING, "trimtab"):
        tt.prepare(scaled(1e-9), Rtn(), [exported.everywhere(**GRID)], start=start)
    assert f"{Q}: all zero once rounded" in caplog.text


def test_what_is_stored_already_is_taken_as_it_is() -> None:
    model = exported.prepared(exported.everywhere(**GRID, scale_dtype="float16"))
    with torch.no_grad():
        model.get_submodule(Q).base.scale.fill_(65504)  # type: ignore[union-attr,operator]
    tt.prepare(model, LrQat(rank=2, storage="int"))


def test_bfloat16_ends_before_float32_does() -> None:
    model = scaled(0.0)
    with torch.no_grad():
        model.get_submodule(Q).weight[0, 0] = 3.402e38  # type: ignore[union-attr,operator,index]
    with pytest.raises(
        UserError, match=rf"{Q}: its weights need scales of 3\.38953e\+38 .* set `scale_dtype: float32`"
    ):
        tt.prepare(model, Rtn(), [exported.everywhere(bits=1, group=32, scale_dtype="bfloat16")])


def test_the_same_while_loading(tmp_path: Path) -> None:
    scaled(1e6).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=f"{Q}: its weights need scales of"):
        tt.load(str(tmp_path / "m"), Rtn(), [exported.everywhere(**GRID)], dtype=torch.float32)


@pytest.mark.parametrize("method", [LrQat(rank=2), Peqa(), Qat()], ids=lambda m: m.name)
@pytest.mark.parametrize(("part", "zero"), [("scale", "symmetric"), ("offset", "real")])
def test_what_was_trained_beyond_its_dtype_is_not_folded(method: Method, part: str, zero: str) -> None:
    model = exported.prepared(exported.everywhere(bits=4, group=32, zero=zero, scale_dtype="float16"), method=method)
    with torch.no_grad():
        getattr(model.get_submodule(Q).adapter, part)[3] = 7e4  # type: ignore[union-attr]
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match=f"{Q}: its weights need scales of 65,504 or more"):
        tt.fold(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_layers_of_which_nothing_is_left_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = scaled(1e-9)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight.zero_()  # type: ignore[union-attr,operator]
    with caplog.at_level(logging.WARNING, "trimtab"):
        tt.prepare(model, Rtn(), [exported.everywhere(bits=4, group=32)])
    (line,) = [r.message for r in caplog.records if "2^-24" in r.message]
    assert line.startswith(f"{Q}: all zero once rounded")
    assert not model.get_submodule(Q).base.dequantize(torch.float32).any()  # type: ignore[union-attr,operator]


def test_groups_that_take_the_least_scale_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = exported.llama(dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule(Q).weight[:3, :32] *= 1e-7  # type: ignore[union-attr,operator,index]
    with caplog.at_level(logging.WARNING, "trimtab"):
        tt.prepare(model, Rtn(), [exported.everywhere(bits=4, group=32)])
    (line,) = [r.message for r in caplog.records if "2^-24" in r.message]
    assert line.startswith(f"{Q} (3 of 128): groups of weights so small")
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trimtab"):
        tt.prepare(scaled(1e-9), Rtn(), [exported.everywhere(bits=4, group=32, scale_dtype="bfloat16")])
        tt.prepare(exported.llama(), Rtn(), [exported.everywhere(bits=4, group=32)])
    assert not [r for r in caplog.records if "2^-24" in r.message]


@pytest.mark.parametrize("rules", [[exported.everywhere(bits=4, group=32)], [{"match": "*", "grid": "float"}]])
def test_weights_beyond_float16_are_called_that(tmp_path: Path, rules: list[dict[str, Any]]) -> None:
    """In layers that stay in float, and in norms; the file holds them well."""
    for name in ("model.norm", Q):
        model = exported.llama(dtype=torch.bfloat16)
        with torch.no_grad():
            model.get_submodule(name).weight.fill_(1e5)  # type: ignore[union-attr,operator]
        model.save_pretrained(tmp_path / name)
        if name == Q and rules[0]["grid"] != "float":
            continue
        with pytest.raises(
            UserError, match=rf"{name}\.weight: holds NaN or infinite values \(float16 holds none above 65,504"
        ):
            tt.load(str(tmp_path / name), Qlora(rank=2), rules, dtype=torch.float16)


@pytest.mark.parametrize("name", [f"{Q}.adapter.delta.A", f"{Q}.base.absmax_scale", "model.norm.weight"])
def test_a_saved_model_that_is_not_finite_is_refused(tmp_path: Path, name: str) -> None:
    """By plain `from_pretrained`, too, and whatever its manifest says."""
    model = exported.prepared(method=Qlora(rank=2))
    exported.shake(model)
    tt.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors[name].flatten()[0] = math.nan
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    (tmp_path / "out/manifest.json").unlink()
    for read in (
        lambda: tt.load(str(tmp_path / "out")),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=f"{name}: holds NaN or infinite values"):
            read()


def overflowing(dtype: torch.dtype) -> PreTrainedModel:
    """Every weight is finite; what is computed of them is not, in float16."""
    model = exported.llama(dtype=dtype)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(6e4)  # type: ignore[union-attr,operator]
    return model


def test_an_overflow_of_float16_is_called_that() -> None:
    windows, said = torch.arange(24).view(2, 12) % 64, r"predicts NaN \(float16 holds none above 65,504.*: use bfloat16"
    model, fine = overflowing(torch.float16), exported.llama()
    with pytest.raises(Diverged, match=f"perplexity: the model: {said}"):
        perplexity(model, windows)
    assert perplexity(overflowing(torch.bfloat16), windows) > 1  # whose numbers go further
    with pytest.raises(Diverged, match=f"compare: the second model: {said}"):
        comparing.apart(fine, model, windows)
    good, bad = parity.logits_of(fine, windows), parity.logits_of(model, windows)
    for trained, other, who in ((bad, bad, "trained"), (good, bad, "reloaded")):
        with pytest.raises(Diverged, match=f"the {who} model: predicts NaN"):
            parity.compare("reloaded", trained, other, windows)
    with pytest.raises(Diverged, match="vllm: predicts NaN"):
        serving.compare("vllm", good[:, :-1].float().log_softmax(-1), bad[:, :-1].float().log_softmax(-1), windows)


def test_a_perplexity_beyond_all_numbers_is_infinite() -> None:
    model = exported.llama(dtype=torch.float32)
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(1e6)  # type: ignore[union-attr,operator]
    assert perplexity(model, torch.arange(24).view(2, 12) % 64) == math.inf


@pytest.mark.parametrize(
    ("fp16", "said"), [(True, r"nan in step 3 \(float16 holds none above"), (False, r"nan in step 3;")]
)
def test_a_loss_that_is_lost_in_float16_is_called_that(tmp_path: Path, fp16: bool, said: str) -> None:
    trainer: Any = object.__new__(Ours)
    trainer._losses = math.nan
    trainer.args = SimpleNamespace(fp16=fp16, should_save=False, output_dir=str(tmp_path))
    trainer.state = SimpleNamespace(global_step=2)
    with pytest.raises(Diverged, match=said):
        trainer._look()


@pytest.mark.parametrize("name", ["dense", "gguf"])
def test_what_a_format_would_write_as_infinite_is_refused(tmp_path: Path, name: str) -> None:
    """A scale that float16 holds, times a code: the matrix it stands for does not fit."""
    model = exported.prepared(exported.everywhere(bits=4, group=32), dtype=torch.float16)
    with torch.no_grad():
        if name == "dense":
            model.get_submodule(Q).base.scale.fill_(3e4)  # type: ignore[union-attr,operator]
        else:
            model.get_submodule("model.norm").weight.fill_(math.inf)  # type: ignore[union-attr,operator]
    with pytest.raises(UserError, match=r"(q_proj|output_norm)\.weight: holds NaN or infinite values"):
        exporting.write(model, byte_level_tokenizer(), name, tmp_path / "out", source=tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_is_rounded_for_a_format_is_held_by_it(tmp_path: Path) -> None:
    rules = [exported.everywhere(bits=1, group=32, scale_dtype="float32")]
    model = tt.prepare(scaled(1e6), Rtn(), rules)
    with pytest.raises(UserError, match=f"{Q}: its weights need scales of"):
        exported.write(model, "compressed-tensors", tmp_path / "out", allow_lossy=True)
