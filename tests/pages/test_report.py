"""`report.html`: what a run, a search and a comparison show, and that a browser shows it, without a word or a request."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import browser
import trimtab
from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.pages import charts, report, vega
from trimtab.pages.html import Page
from trimtab.report.terminal import Terminal
from trimtab.words import duration, perplexity

needs_vega = pytest.mark.skipif(vega.lacking(), reason="needs trimtab[report]")
needs_browser = pytest.mark.skipif(browser.chromium() is None, reason="needs Chromium")
STAGE = {"max_difference": 0, "rms_difference": 0, "top1_agreement": 1, "kl": 0, "perplexity": 9.5, "identical": True}
METRICS = {
    "perplexity": {"float": 9.0, "rounded": 300.0, "tuned": 10.25},
    "answers": {"before": "", "after": "4 <b>bold</b>"},
    "output": "runs/small",
    "method": "lr-qat",
    "fold": "2 layers folded, bitwise",
    "losses": [3.0, 2.0],
    "tokens": 4000,
    "train_seconds": 8.0,
    "trainable": 12,
    "peak_memory_bytes": 3_000_000,
    "disk_bytes": 70_000,
    "seconds": 125,
    "max_logit_difference": 0,
    "moved_by_training": {"codes": 30, "of_codes": 400, "groups": 1, "of_groups": 2},
}
RECORD = {
    "history": [
        {"step": 1, "loss": 3.0, "learning_rate": 0.01},
        {"step": 2, "loss": 2.0, "learning_rate": 0.005, "eval_loss": 2.5},
    ],
    "layers": [
        {"name": "model.embed_tokens", "shape": [64, 8], "bits": 8, "error": 0.01, "fold_error": None},
        {
            "name": "model.layers.10.mlp.up_proj", "shape": [8, 8], "bits": 3, "error": 0.2, "fold_error": 0.0,
            "codes": 10, "of_codes": 200,
        },
        {
            "name": "model.layers.2.mlp.up_proj", "shape": [8, 8], "bits": 3, "error": 0.1, "fold_error": 0.0,
            "codes": 20, "of_codes": 200,
        },
    ],
    "example": [["2 and 2 is", False], [" 4</script>", True]],
    "plan": {"process": 1_000_000, "total": 1_500_000, "codes": 1_000_000, "adapters": 500_000, "teacher": 0},
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
SERVED = {"engine": "vllm", "tokens": 64, "max_logprob": 0.01, "rms_logprob": 0.001, "top1_agreement": 0.99,
          "perplexity_trained": 10.25, "perplexity_served": 10.26}  # fmt: skip


def write(folder: Path, **files: Any) -> None:
    """Each file, `name_ending`, with its values as JSON or its text."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        text = values if isinstance(values, str) else json.dumps(values)
        (folder / name.replace("__", "-").replace("_", ".")).write_text(text)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with an export that vLLM was asked about."""
    folder = tmp_path / "small"
    parity = {"tokens": 64, "text": "held-out", "stages": [{"stage": "trained", **STAGE}, {"stage": "folded", **STAGE}]}
    write(folder, metrics_json=METRICS, report_json=RECORD, parity_json=parity, recipe_yaml="name: small\n# <i>")
    write(folder, config_json={"quantization_config": {"quant_method": "trimtab"}}, model_safetensors="x" * 10)
    export = {"quantization_config": {"quant_method": "compressed-tensors"}}
    write(folder / "compressed-tensors", config_json=export, export_json={}, parity__vllm_json=SERVED)
    manifest.write_manifest(folder / "compressed-tensors", "export")
    manifest.write_manifest(folder, "run")
    return folder


@pytest.fixture
def search(tmp_path: Path) -> Path:
    folder = tmp_path / "search"
    head = "number,kind,steps,state,bytes,quality,seconds,reason,model.layers.0.qkv,model.layers.1.qkv\n"
    first, second = "0,uniform,0,complete,1000000,0.5,2.0,,2,2\n", "3,search,0,complete,1500000,0.125,2.0,,2,4r16\n"
    failed = '4,search,0,infeasible,2000000,,1.0,"loss is nan, <x>",4r16,4r16\n'
    about = {"folder": "runs/s/search", "objective": "rounded", "budget": 1_600_000, "float_bytes": 4_000_000,
             "float_quality": None}  # fmt: skip
    write(folder, search_json=about, trials_csv=head + first + second + failed, front_csv=head + first + second)
    return folder


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    folder = tmp_path / "compare"
    sides = {"first": {"path": "a + <lora>", "perplexity": 9.0, "bytes": 1000}}
    sides["second"] = {"path": "b", "perplexity": 12000.0, "bytes": 300}
    worst = [{"before": "once upon", "token": " a", "first": " a", "second": " the", "kl": 2.5}]
    numbers = {"kl": 0.25, "kl_error": 0.01, "top1_agreement": 0.75, "loss_difference": 0.3, "loss_error": 0.02}
    about = {"data": "text.jsonl", "split": "train", "tokens": 512, "block_tokens": 64}
    quantiles = [[0.01, 0.0], [0.5, 0.01], [0.99, 1.5]]
    write(folder, compare_json={**sides, **numbers, **about, "quantiles": quantiles, "apart": worst})
    return folder


def values(chart: dict[str, Any]) -> list[dict[str, Any]]:
    return list(chart["data"]["values"])


def by_caption(page: Page, words: str) -> dict[str, Any]:
    """The chart with these words under it."""
    html = page.html("")
    found = re.findall(r'id="(chart\d+)"></div><figcaption>([^<]*)<', html)
    return next(dict(page.charts[name]) for name, caption in found if words in caption)


def test_a_run(run: Path) -> None:
    page = report.page(run)
    html = page.html("")
    for part in ("10.25", "300.00", "2 min 5 s", "same bits", "500 tokens a second", "compressed-tensors in vllm", "10.26",
                 "vllm serve runs/small/compressed-tensors", "trimtab chat runs/small", "2.13.0", "# &lt;i&gt;",
                 "30 of 400 codes (7.50%)", "4 &lt;b&gt;bold", "(nothing)", "<mark> 4&lt;/script&gt;</mark>"):  # fmt: skip
        assert part in html, part
    losses = values(by_caption(page, "Loss"))
    assert [(r["step"], r["loss"]) for r in losses if r["of"] == "training"] == [(1, 3.0), (2, 2.0)]
    assert [(r["step"], r["loss"]) for r in losses if r["of"] == "held-out"] == [(2, 2.5)]
    assert [r["rate"] for r in values(by_caption(page, "rate"))] == [0.01, 0.005]
    assert [r["value"] for r in values(by_caption(page, "Lower is better"))] == [9.0, 300.0, 10.25]
    moved = {r["name"]: r["moved"] for r in values(by_caption(page, "training moved"))}
    assert moved == {"model.layers.2.mlp.up_proj": 0.1, "model.layers.10.mlp.up_proj": 0.05}
    errors = values(by_caption(page, "Rounding before"))
    assert [(r["block"], r["error"]) for r in errors] == [("2", 0.1), ("10", 0.2), ("-", 0.01)], "blocks in their order"
    memory = values(by_caption(page, "Peak memory"))
    assert sum(r["value"] for r in memory if r["name"].startswith("planned")) == 2_500_000
    assert {r["value"] for r in memory if r["name"].startswith("measured")} == {3_000_000}
    assert {r["name"]: r["shown"] for r in values(by_caption(page, "Each format"))}["native"] == "70.0 kB"


def test_perplexity_of_rows_with_prompts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where training learns the answers alone, the perplexity of whole rows may rise: both say what it is of."""
    found = METRICS | {"perplexity_of": "whole rows, prompts included"}
    write(tmp_path / "asked", metrics_json=found, config_json={})
    write(tmp_path / "read", metrics_json=METRICS, config_json={})
    assert by_caption(report.page(tmp_path / "asked"), "on the same tokens, whole rows, prompts included.")
    assert by_caption(report.page(tmp_path / "read"), "on the same tokens.")
    Terminal().finish({"perplexity": {"tuned": 9.0}, "perplexity_of": found["perplexity_of"], "output": "asked"}, [])
    assert "perplexity is that of whole rows, prompts included; training" in capsys.readouterr().out


def test_a_run_that_says_little(tmp_path: Path) -> None:
    """A folder of an earlier release has no report.json, and one that was only rounded no losses."""
    write(tmp_path / "old", metrics_json={"perplexity": {}, "losses": []}, config_json={})
    html = report.page(tmp_path / "old").html("")
    assert "Training" not in html
    assert "Layers" not in html
    write(tmp_path / "old", metrics_json={"losses": [2.0, 1.5]})
    assert [r["loss"] for r in values(by_caption(report.page(tmp_path / "old"), "Loss"))] == [2.0, 1.5]


def test_a_search(search: Path) -> None:
    page = report.page(search)
    html = page.html("")
    for part in (
        "points/2.yaml",
        "1.5 MB",
        "0.125",
        "loss is nan, &lt;x&gt;",
        "trimtab run runs/s/search/points/2.yaml",
    ):
        assert part in html, part
    front = by_caption(page, "The float model takes 4.0 MB")
    all_trials, best, budget = front["layer"]
    assert [(t["megabytes"], t["quality"], t["bits"]) for t in values(front)] == [(1.0, 0.5, 2.0), (1.5, 0.125, 3.0)]
    assert [t["recipe"] for t in values(best)] == ["points/1.yaml", "points/2.yaml"]
    assert {"megabytes", "quality", "bits", "number"} <= {t["field"] for t in all_trials["encoding"]["tooltip"]}
    assert "recipe" in {t["field"] for t in best["encoding"]["tooltip"]}, "what a point is stands under the pointer"
    assert values(budget)[0]["megabytes"] == 1.6
    bits = values(by_caption(page, "spends its bytes"))
    assert [(b["unit"], b["bits"]) for b in bits][2:] == [("model.layers.0.qkv", 2), ("model.layers.1.qkv", 4)]


def test_a_comparison(comparison: Path) -> None:
    page = report.page(comparison)
    html = page.html("")
    for part in ("0.25", "75.00%", "9.00", "1.20e+04", "a + &lt;lora&gt;", "+0.3000 ± 0.02", "...once upon", " the"):
        assert part in html, part
    assert [r["kl"] for r in values(by_caption(page, "KL at"))] == [0.01, 1.5], "a logarithm of 0 is none"


def test_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run, search or comparison"):
        trimtab.write_report(tmp_path)


@needs_vega
def test_again(run: Path) -> None:
    """With what has come since; the folder stays one that may be verified and replaced."""
    file = trimtab.write_report(run)
    assert "10.26" in file.read_text()
    write(run / "compressed-tensors", parity__vllm_json=SERVED | {"perplexity_served": 77.0})
    assert trimtab.write_report(run) == file
    assert "77.00" in file.read_text()
    assert "report.html" in manifest.others(run)
    manifest.verify(run)


def test_without_the_extra(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vega, "missing", lambda _: ["vl_convert"])
    said: list[str] = []
    report.make(run, said.append)
    assert len(said) == 1
    assert "pip install 'trimtab[report]'" in said[0]
    assert not (run / "report.html").exists()


def test_what_a_text_holds_is_no_markup() -> None:
    page = Page("<script>alert(1)</script>", "a & b")
    page.figures((charts.bars([{"name": "</script><img>", "value": 1, "shown": "1"}], title="t"), "x"))
    html = page.html("")
    assert "<script>alert" not in html
    assert "</script><img>" not in html
    assert (
        values(json.loads(re.search(r'id="charts">(.*?)</script>', html)[1])["chart0"])[0]["name"] == "</script><img>"
    )  # type: ignore[index]


@needs_vega
@needs_browser
@pytest.mark.parametrize("kind", ["run", "search", "comparison"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(kind: str, dark: bool, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(kind)
    page = report.page(folder)
    file = tmp_path / "report.html"
    file.write_text(page.html(vega.script()))
    opened = browser.open_page(file, dark=dark)
    assert opened.console == []
    assert opened.requests == []
    drawn = re.findall(r'id="chart\d+"[^>]*>\s*<svg', re.sub(r"<details.*?</details>", "", opened.dom))
    assert len(drawn) == len(page.charts) > 1
    ink = "#c9cdd2" if dark else "#3b4046"
    assert ink in opened.dom.partition("<main>")[2].partition("</main>")[0], (
        "the text of charts is in the reader's mode"
    )


_POINT = """<script>setTimeout(() => {
  const point = [...document.querySelectorAll(".layer_1_layer_1_marks path")].pop(), at = point.getBoundingClientRect();
  for (const kind of ["pointerover", "pointermove"])
    point.dispatchEvent(new PointerEvent(kind, { bubbles: true, clientX: at.x + 2, clientY: at.y + 2 }));
}, 3000);</script>"""


@needs_vega
@needs_browser
def test_what_a_point_is_stands_under_the_pointer(search: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(report.page(search).html(vega.script()) + _POINT)
    opened = browser.open_page(file)
    tip = opened.dom.partition('id="vg-tooltip-element"')[2].partition("</table>")[0]
    assert "points/2.yaml" in tip
    assert "mean bits" in tip
    assert opened.console == []


@needs_browser
def test_the_browser_would_tell(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='https://example.org/x.png'><script>console.error('boom')</script>")
    opened = browser.open_page(page)
    assert "boom" in opened.console[0]
    assert opened.requests == ["https://example.org/x.png"]
    policy = Page("a", "b").html("fetch('https://example.org/y')")
    page.write_text(policy)
    opened = browser.open_page(page)
    assert opened.requests == [], "the policy of our pages lets none through"
    assert any("Content Security Policy" in line for line in opened.console)


CALLS: list[tuple[Callable[[float], str], float, str]] = [
    (duration, 4.24, "4.2 s"), (duration, 60, "1 min 0 s"), (duration, 7500, "2 h 5 min"),
    (perplexity, 8.056, "8.06"), (perplexity, 12345.0, "1.23e+04"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "value", "words"), CALLS)
def test_words(function: Callable[[float], str], value: float, words: str) -> None:
    assert function(value) == words
