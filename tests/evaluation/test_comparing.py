"""Two models on one text: against torch's own divergence, and adapters against peft's own model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny
import trimtab
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.errors import UserError
from trimtab.evaluation import comparing
from trimtab.evaluation.perplexity import perplexity
from trimtab.formats import manifest
from trimtab.formats.native.write import save
from trimtab.models.load import load, load_float
from trimtab.models.with_adapter import load_model


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float `model`, `saved` in 3 bits, peft's `lora` of two ranks and `plain` of one on `model`, and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    model, tokenizer = load(str(folder / "model"), rules=tiny.RULES)
    save(model, folder / "saved", tokenizer)
    for name, patterns in (("lora", {"down_proj": 8}), ("plain", {})):
        base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], rank_pattern=patterns)
        tuned = get_peft_model(base, config)
        torch.manual_seed(1)
        for parameter_name, p in tuned.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(p, std=0.2)
        tuned.save_pretrained(folder / name)
    return folder


def windows(given: Path) -> torch.Tensor:
    return token_windows(load_rows(str(given / "data.jsonl")), tiny.tokenizer(), block_tokens=32, limit_tokens=128)


def said_losses(log_WLV: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return -log_WLV.double().gather(-1, tokens[:, 1:, None])[..., 0]


def test_apart_is_torchs_divergence(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, tokens = load_float(str(given / "model")), load(str(given / "saved"))[0], windows(given)
    monkeypatch.setattr(comparing, "_AT_ONCE", 260 * 7)  # in several chunks, the last one shorter
    found = comparing.apart(first, second, tokens)
    with torch.no_grad():
        a, b = (m(input_ids=tokens).logits[:, :-1].float().log_softmax(-1) for m in (first, second))
    kl = F.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found.kl, kl, rtol=1e-3, atol=1e-5)
    assert torch.equal(found.first_top == found.second_top, a.argmax(-1) == b.argmax(-1))
    about: Any = {"first": ("a", 10), "second": ("b", 4), "data": "d", "split": "s"}
    said = comparing.summary(found, tokens, tiny.tokenizer(), **about)
    assert said.kl == pytest.approx(kl.mean().item(), rel=1e-3)
    for side, model in ((said.first, first), (said.second, second)):
        assert side.perplexity == pytest.approx(perplexity(model, tokens), rel=1e-3)
    means = kl.double().mean(1)
    assert said.kl_error == pytest.approx((means.std() / len(means) ** 0.5).item(), rel=1e-2)
    assert said.loss_difference == pytest.approx(
        torch.tensor(said.second.perplexity / said.first.perplexity).log().item(), rel=1e-3
    )
    assert said.apart[0]["kl"] == pytest.approx(kl.max().item(), rel=1e-3)
    differences = (said_losses(b, tokens) - said_losses(a, tokens)).mean(1)
    assert said.loss_error == pytest.approx((differences.std() / len(differences) ** 0.5).item(), rel=1e-2)
    for share, value in said.quantiles:
        assert value == pytest.approx(kl.flatten().double().quantile(share).item(), rel=1e-3)
    window, at = divmod(int(kl.argmax()), 31)
    assert said.apart[0]["token"] == tiny.tokenizer().decode(tokens[window, at + 1])
    assert said.apart[0]["before"].endswith(tiny.tokenizer().decode(tokens[window, at]))


def test_a_model_is_no_way_from_itself(given: Path) -> None:
    model = load_float(str(given / "model"))
    found = comparing.apart(model, model, windows(given))
    assert found.kl.max() == 0
    assert torch.equal(found.first_loss, found.second_loss)


@pytest.mark.parametrize("base", ["model", "saved"])
def test_an_adapter_is_pefts(given: Path, base: str) -> None:
    """Beside its base, which stays as it is: the float model as well as one in 3 bits."""
    adapter = "lora" if base == "model" else "plain"
    ours, _ = load_model(str(given / base), str(given / adapter), dtype=torch.float32)
    without = AutoModelForCausalLM.from_pretrained(given / base, dtype=torch.float32)
    tokens = windows(given)
    with torch.no_grad():
        plain, found = (m(input_ids=tokens).logits for m in (without, ours))
        assert (found - plain).abs().max() > 0.01
    if base == "model":
        theirs = PeftModel.from_pretrained(without, given / adapter)
        with torch.no_grad():
            torch.testing.assert_close(found, theirs(input_ids=tokens).logits, rtol=2e-2, atol=5e-3)


def test_the_command(given: Path, tmp_path: Path) -> None:
    """A PEFT directory alone names its base; what is written may be made again, and holds what was found."""
    out = tmp_path / "out"
    said: list[str] = []
    text = str(given / "data.jsonl")
    found = trimtab.compare(str(given / "lora"), str(given / "saved"), text, block_tokens=32, out=out, say=said.append)
    assert found.first.path == f"{given / 'model'} + {given / 'lora'}"
    assert found.kl > 0.001
    held = [*(given / "model").iterdir(), *(given / "lora").glob("adapter_*")]
    assert found.first.bytes == sum(f.stat().st_size for f in held), "an adapter counts beside its base"
    assert found.second.bytes < (given / "model" / "model.safetensors").stat().st_size < found.first.bytes
    assert json.loads((out / "compare.json").read_text()) == json.loads(json.dumps(found.to_json()))
    assert manifest.kind_of(out) == "comparison"
    again = trimtab.compare(str(given / "lora"), str(given / "saved"), text, block_tokens=32, out=out)
    assert again == found
    same = trimtab.compare(
        str(given / "model"), str(given / "lora"), text, first_adapter=str(given / "lora"), block_tokens=32, out=out
    )
    assert (same.kl, same.top1_agreement) == (0, 1)


def test_refused(given: Path, tmp_path: Path) -> None:
    text, model = str(given / "data.jsonl"), str(given / "model")
    tiny.model(tmp_path / "other")
    other = tmp_path / "other" / "tokenizer.json"
    values = json.loads(other.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    other.write_text(json.dumps(values))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"second": str(tmp_path / "other")}, "different tokenizers"),
        ({"second": model, "tokens": 1}, "tokens: 1"),
        ({"second": model, "dtype": "int8"}, "dtype: 'int8'"),
        ({"second": model, "out": tmp_path / "mine"}, "notes.txt"),
        ({"second": str(given / "lora"), "second_adapter": str(given / "lora")}, "is a PEFT adapter itself"),
    ]
    for options, words in wrong:
        with pytest.raises(UserError, match=words):
            trimtab.compare(model, data=text, **{"out": tmp_path / "out", "block_tokens": 32, **options})
    assert not (tmp_path / "out").exists()
