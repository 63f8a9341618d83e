"""The page of a run: what was trained, what it became, what it costs, and how to serve it.

    metrics.json, parity.json, report.json, recipe.yaml    of the run
    <format>/export.json, <format>/parity-<engine>.json     of its exports, whenever they were made

What a file does not say (of a run from before it was written, say) the page leaves out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.formats.manifest import read_json
from trimtab.models.held import Held, held
from trimtab.pages import charts
from trimtab.pages.html import Page
from trimtab.words import STAGES, duration, perplexity, size

_PARTS = {
    "process": "interpreter and libraries",
    "codes": "codes and scales",
    "float_parameters": "weights in float",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "temporary": "buffers",
    "teacher": "teacher",
}
_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")


def page(folder: Path, name: str) -> Page:
    """The page of a run's folder.

    Args:
        folder: with the files above.
        name: of the run.
    """
    metrics, record = read_json(folder / "metrics.json"), read_json(folder / "report.json")
    engines = {h.format: served(h) for h in held(folder)}
    about = f"{metrics.get('method', '')}; {metrics.get('fold', '')}; written to {metrics.get('output', folder)}"
    made = Page(name, about)
    made.cards(_first(metrics, engines))
    _training(made, metrics, record)
    _quality(made, folder, metrics, engines)
    _costs(made, folder, metrics, record)
    _layers(made, metrics, record.get("layers", []))
    _samples(made, metrics, record)
    serve(made, folder)
    _provenance(made, folder, record)
    return made


def served(export: Held) -> list[dict[str, Any]]:
    """What `trimtab parity` found of an export, an engine each."""
    folder = export.path.parent if export.path.is_file() else export.path
    return [read_json(file) for file in sorted(folder.glob("parity-*.json"))]


def _first(metrics: Mapping[str, Any], engines: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, str]]:
    values = metrics.get("perplexity", {})
    cards = [(f"perplexity, {STAGES[k]}", perplexity(values[k])) for k in STAGES if values.get(k) is not None]
    cards += [("model on disk", size(metrics["disk_bytes"]))] if "disk_bytes" in metrics else []
    meters = {"device_peak_memory_bytes": f"peak memory of {metrics.get('device')}", "peak_memory_bytes": "peak memory"}
    cards += [(words, size(metrics[name])) for name, words in meters.items() if name in metrics]
    cards += [("the whole run took", duration(metrics["seconds"]))] if "seconds" in metrics else []
    if "max_logit_difference" in metrics:
        same = metrics["max_logit_difference"] == 0
        cards.append(("trained = folded = saved", "same bits" if same else f"{metrics['max_logit_difference']:.2g}"))
    return cards


def _training(made: Page, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    history = record.get("history") or [
        {"step": i + 1, "loss": loss} for i, loss in enumerate(metrics.get("losses", []))
    ]
    losses = [{"step": h["step"], "loss": h["loss"], "of": "training"} for h in history if h.get("loss") is not None]
    held_out = [{"step": h["step"], "loss": h["eval_loss"], "of": "held-out"} for h in history if h.get("eval_loss")]
    if not losses:
        return
    tokens, seconds = metrics.get("tokens", 0), metrics.get("train_seconds", 0)
    speed = f", {tokens / seconds:,.0f} tokens a second" if seconds else ""
    made.section(
        "Training", f"{metrics.get('trainable', 0):,} parameters, {tokens:,} tokens in {duration(seconds)}{speed}"
    )
    shown = [
        (
            charts.line(losses + held_out, "step", "loss", titles=("step", "loss, nats per token"), by="of"),
            "Loss of each logged step.",
        )
    ]
    rates = [{"step": h["step"], "rate": h["learning_rate"]} for h in history if h.get("learning_rate") is not None]
    if rates:
        chart = charts.line(rates, "step", "rate", titles=("step", "learning rate"))
        shown.append((chart, "Learning rate of the deltas; that of scales rises and falls with it."))
    made.figures(*shown)


def _quality(
    made: Page, folder: Path, metrics: Mapping[str, Any], engines: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    values = {STAGES[k]: v for k, v in metrics.get("perplexity", {}).items() if k in STAGES and v is not None}
    parity = read_json(folder / "parity.json")
    by_engine = [(f"{format_} in {p['engine']}", p) for format_, found in engines.items() for p in found]
    if not (values or parity or by_engine):
        return
    made.section("Quality")
    if values:
        bars = [{"name": name, "value": value, "shown": perplexity(value)} for name, value in values.items()]
        far = max(values.values()) > 20 * min(values.values())
        of = f", {metrics['perplexity_of']}" if "perplexity_of" in metrics else ""
        about = f"Lower is better, on the same tokens{of}."
        made.figures((charts.bars(bars, title="held-out perplexity", log=far), about))
    for name, key in (("tasks", "tasks"),):
        found = [(task, f"{v:.4f} ± {e:.4f}", str(n)) for task, (v, e, n) in metrics.get(key, {}).items()]
        if found:
            made.table((name, "accuracy", "items"), found, numbers=(1, 2))
    if parity:
        made.text(f"Trained = folded = saved, on {parity['tokens']} tokens of {parity['text']} text:")
        rows = [
            (p["stage"], f"{p['max_difference']:.3g}", f"{p['rms_difference']:.3g}", f"{p['top1_agreement']:.2%}",
             f"{p['kl']:.3g}", perplexity(p["perplexity"]), "yes" if p["identical"] else "no")
            for p in parity["stages"]
        ]  # fmt: skip
        header = ("", "largest logit difference", "rms", "top-1", "KL", "perplexity", "same bits")
        made.table(header, rows, numbers=(1, 2, 3, 4, 5))
    if by_engine:
        made.text("Served = trained, as `trimtab parity` found it, on the tokens of each check:")
        served_rows = [
            (name, f"{p['max_logprob']:.3g}", f"{p['rms_logprob']:.3g}", f"{p['top1_agreement']:.2%}",
             perplexity(p["perplexity_trained"]), perplexity(p["perplexity_served"]))
            for name, p in by_engine
        ]  # fmt: skip
        columns = ("", "largest log-probability difference", "rms", "top-1", "perplexity, trained", "served")
        made.table(columns, served_rows, numbers=(1, 2, 3, 4, 5))


def _costs(made: Page, folder: Path, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    shown = []
    plan, there = record.get("plan"), metrics.get("device_peak_memory_bytes")
    measured = metrics.get("peak_memory_bytes") if there is None else there
    if plan and measured:
        total = plan["total"] + (plan["process"] if there is None else 0)
        names = (f"planned, {size(total)}", f"measured, {size(measured)}")
        rows = [
            {"name": names[0], "value": plan[part], "part": words, "shown": size(plan[part])}
            for part, words in _PARTS.items()
            if plan.get(part) and (there is None or part != "process")  # the host's
        ]
        rows.append({"name": names[1], "value": measured, "part": "measured", "shown": size(measured)})
        whose = "the process" if there is None else metrics["device"]
        note = f"Peak memory of {whose}; parts that are never there at once are planned to overlap."
        shown.append((charts.bars(rows, title="bytes", by=True), note))
    written = {h.format: h.bytes for h in held(folder)}
    written |= {"native": metrics["disk_bytes"]} if "disk_bytes" in metrics else {}  # without this page
    sizes = [{"name": name, "value": count, "shown": size(count)} for name, count in written.items()]
    shown.append((charts.bars(sizes, title="bytes on disk"), "Each format that was written."))
    made.section("Memory and size")
    made.figures(*shown)


def _layers(made: Page, metrics: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
    if not layers:
        return
    rows = []
    for layer in layers:
        found = _BLOCK.match(layer["name"])
        block, part = (found[1], found[2]) if found else ("-", layer["name"].rpartition(".")[2])
        moved = layer["codes"] / layer["of_codes"] if layer.get("of_codes") else None
        shape = " x ".join(map(str, layer["shape"]))
        rows.append({**layer, "block": block, "part": part, "moved": moved, "shape": shape})
    rows.sort(key=lambda r: (not r["block"].isdecimal(), int(r["block"]) if r["block"].isdecimal() else 0))
    about = [("name", "layer", ""), ("shape", "shape", ""), ("bits", "bits", "")]
    shown = []
    if any(r["moved"] for r in rows):
        some = [r for r in rows if r["moved"] is not None]
        chart = charts.heat(some, value="moved", title="codes moved", tooltip=[*about, ("moved", "codes moved", ".3%")])
        shown.append((chart, "Share of each layer's codes that training moved."))
    if any(r["error"] for r in rows):
        some = [r for r in rows if r["error"] is not None]
        chart = charts.heat(
            some, value="error", title="error", format_=".3~g", tooltip=[*about, ("error", "error", ".4f")]
        )
        shown.append((chart, "Rounding before training: ||rounded - float|| / ||float|| of each layer's weight."))
    made.section("Layers")
    from_training = metrics.get("moved_by_training", {})
    if from_training.get("of_codes"):
        codes, of_codes = from_training["codes"], from_training["of_codes"]
        made.text(f"Training moved {codes:,} of {of_codes:,} codes ({codes / of_codes:.2%}).")
    if shown:
        made.figures(*shown)


def _samples(made: Page, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    answers = metrics.get("answers", {})
    if answers:
        made.section("An answer before and after")
        made.pair(
            *((f"{when} tuning", answers[when] or "(nothing)") for when in ("before", "after") if when in answers)
        )
    if record.get("example"):
        made.section("A trained example", "The first training sequence; what is marked is learned.")
        made.marked([(text, learned) for text, learned in record["example"]])


def serve(made: Page, folder: Path) -> None:
    """The commands that run what a folder holds."""
    made.section("Serve it")
    out = Path(read_json(folder / "metrics.json").get("output", folder))  # a run is made beside its output
    there = [replace(h, path=out / h.path.relative_to(folder)) for h in held(folder)]
    lines = [f"{h.line()}    # {h.format} in {h.engine}" for h in there if h.engine is not None]
    made.code("\n".join([f"trimtab chat {out}", *lines]))


def _provenance(made: Page, folder: Path, record: Mapping[str, Any]) -> None:
    made.section("How it was made")
    if record.get("versions"):
        made.table(("", ""), list(record["versions"].items()))
    if (folder / "recipe.yaml").is_file():
        made.code((folder / "recipe.yaml").read_text(encoding="utf-8"), "recipe.yaml")
