"""The page of a comparison: `compare.json` in words, and what each model costs."""

from pathlib import Path

from trimtab.formats.manifest import read_json
from trimtab.pages import charts
from trimtab.pages.html import Page
from trimtab.words import perplexity, size


def page(folder: Path, name: str) -> Page:
    """The page of a comparison's folder.

    Args:
        folder: with `compare.json`.
        name: of the page.
    """
    found = read_json(folder / "compare.json")
    sides = {"A": found["first"], "B": found["second"]}
    on = f"{found['tokens']:,} tokens of {found['data']} ({found['split']}), windows of {found['block_tokens']}"
    made = Page(name, on)
    made.cards(
        [
            ("KL(A || B), nats a token", f"{found['kl']:.4g}"),
            ("same likeliest token", f"{found['top1_agreement']:.2%}"),
            *((f"perplexity of {side}", perplexity(model["perplexity"])) for side, model in sides.items()),
            ("loss of B minus that of A", f"{found['loss_difference']:+.4f}"),
        ]
    )
    made.section("The two models")
    rows = [(s, m["path"], perplexity(m["perplexity"]), size(m["bytes"])) for s, m in sides.items()]
    made.table(("", "model", "perplexity", "files"), rows, numbers=(2, 3))
    made.text(
        f"KL {found['kl']:.4g} ± {found['kl_error']:.2g}, loss of B minus that of A {found['loss_difference']:+.4f} ± "
        f"{found['loss_error']:.2g} (standard errors over windows)."
    )
    values = [{"name": s, "value": m["perplexity"], "shown": perplexity(m["perplexity"])} for s, m in sides.items()]
    sizes = [{"name": s, "value": m["bytes"], "shown": size(m["bytes"])} for s, m in sides.items()]
    made.figures(
        (charts.bars(values, title="perplexity"), "Lower is better, on the same tokens."),
        (charts.bars(sizes, title="bytes of its files"), "What is read to load it, tokenizer included."),
    )
    made.section("Where they differ")
    if found["kl"] > 0:
        spread = [{"share": share, "kl": kl} for share, kl in found["quantiles"] if kl > 0]
        chart = charts.line(spread, "share", "kl", titles=("share of the tokens", "KL not exceeded, nats"), log=True)
        made.figures((chart, "KL at a tenth, a half, ... of the tokens: most differ little, a few much."))
    worst = [(f"{r['kl']:.3g}", f"...{r['before']}", r["token"], r["first"], r["second"]) for r in found["apart"]]
    made.table(("KL", "after", "the text has", "A: likeliest", "B: likeliest"), worst, numbers=(0,))
    return made
