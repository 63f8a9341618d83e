"""The command line and the terminal: what each command prints."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import tiny
from trimtab import cli, methods
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.errors import UserError
from trimtab.evaluation import chat
from trimtab.evaluation.parity import Parity
from trimtab.evaluation.perplexity import perplexity
from trimtab.formats.native.write import save
from trimtab.memory import process, settings
from trimtab.memory import speed as probe
from trimtab.methods import LrQat
from trimtab.models.load import load, load_float
from trimtab.models.prepare import fold
from trimtab.pipeline import planning
from trimtab.recipe import explain, recipe
from trimtab.report import tables
from trimtab.report.terminal import Terminal, size
from trimtab.training.trainer import Step

Command = Callable[..., str]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, the same quantized, `saved`, data, `data.jsonl`, and a recipe, `recipe.yaml`."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    file = tiny.write(folder / "recipe.yaml", tiny.recipe(folder / "model", folder / "data.jsonl", folder / "run"))
    model, tokenizer = load(str(folder / "model"), LrQat(rank=4), tiny.RULES)
    fold(model)
    save(model, folder / "saved", tokenizer, recipe=recipe.read(file).to_yaml())
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line that must succeed, and gives what it prints."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    return run


def blocks(folder: Path, block_tokens: int, limit: int | None = None) -> tuple[object, ...]:
    rows = load_rows(str(folder / "data.jsonl"))
    tokens = token_windows(rows, tiny.tokenizer(), block_tokens=block_tokens, limit_tokens=limit)
    return tokens, tokens.numel()


def test_eval(given: Path, command: Command) -> None:
    """On the recipe's held-out data, or on any; a float model is measured as it is, not rounded."""
    saved, _ = load(str(given / "saved"))
    tokens, count = blocks(given, 32, 256)
    line = command("eval", given / "saved")
    assert line == (
        f"perplexity {perplexity(saved, tokens):.4f} on {count} tokens of {given / 'data.jsonl'} (train), windows of 32\n"
    )
    tokens, count = blocks(given, 64)
    float_model = load_float(str(given / "model"))
    for name, model in (("saved", saved), ("model", float_model)):
        line = command("eval", given / name, "--data", given / "data.jsonl", "--block-tokens", 64)
        assert line.startswith(f"perplexity {perplexity(model, tokens):.4f} on {count} tokens")
    assert perplexity(saved, tokens) != perplexity(float_model, tokens)


def test_chat(given: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(str(given / "saved"))
    expected = chat.Chat(model, tokenizer).answer("Hello?", 12)
    assert command("chat", given / "saved", "--prompt", "Hello?", "--tokens", 12) == expected + "\n"
    long = "a word " * 40 + "[bold]and[/bold] :smile: [/]"
    monkeypatch.setattr(chat.Chat, "stream", lambda *_: iter([long[:7], long[7:]]))
    assert command("chat", given / "saved", "--prompt", "Hello?") == long + "\n"  # neither wrapped nor interpreted
    questions = iter(["one", "/reset", "two", "/what", " "])
    monkeypatch.setattr(Console, "input", lambda *_: next(questions))
    printed = command("chat", given / "saved")
    assert printed.count(long) == 2
    assert "\nforgotten\n" in printed
    assert "/what is none of /reset" in printed


def test_answers_without_a_chat_template(given: Path) -> None:
    model, _ = load(str(given / "saved"))
    plain = tiny.tokenizer(template=None)
    ids = plain("two plus", return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tiny.EOS)
    expected = plain.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert chat.Chat(model, plain).answer("two plus", 5) == expected


def test_plan(given: Path, command: Command) -> None:
    """From a float directory and from a saved one; it writes and loads nothing."""
    onto = [f"model.path={given / 'saved'}", "rules=null", "method={name: lora, rank: 4}"]
    for more, trainable in (([], "10,496"), (onto, "8,192")):
        printed = command("plan", given / "recipe.yaml", *more, "--no-probe")
        assert "predicted peak of training" in printed
        assert re.search(rf"trainable parameters\s+{trainable}", printed)
        assert re.search(r"total, above the interpreter and its libraries\s+[\d.]+ [kM]B", printed)
        assert re.search(r"memory free here: [\d.]+ [MG]B: fits, [\d.]+ [MG]B left", printed)
        assert printed.startswith("planning ")
        assert "tokens a second" not in printed
        assert max(map(len, printed.splitlines()[1:])) <= 80
    assert not (given / "run").exists()


def test_plan_of_a_model_for_a_memory(given: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a recipe; the probe comes last."""
    monkeypatch.setattr(settings, "METHODS", ())
    monkeypatch.setattr(probe, "SECONDS", 0.1)
    printed = command("plan", given / "model", "--memory", "1GiB", "data.block_tokens=64")
    assert printed.splitlines()[0] == f"planning {given / 'model'} for 1GiB"
    assert "no recipe, so this is the plan of lr-qat with sequences of 64 tokens, 8,192 in a step" in printed
    assert "memory given: 1.07 GB: fits" in printed
    assert re.search(r"lr-qat\s+int4 g64\s+32\s+64\s+64\s+[\d.]+ MB", printed)
    assert printed.splitlines()[-1].startswith("about ")


def test_data(given: Path, command: Command) -> None:
    """Numbers, sources and the first example with what is learned of it; nothing is written, no weight is read."""
    before = sorted(given.rglob("*"))
    said = command("data", given / "recipe.yaml", "data.loss=full", "train.steps=3")
    for part in ("training data", "trained on", "texts", "first example", "⟦", "3 (", "cut"):
        assert part in said
    assert sorted(given.rglob("*")) == before


def test_methods_and_recipe(command: Command) -> None:
    printed = command("methods")
    for method in methods.ALL:
        assert method.name in printed
    assert command("recipe") == recipe.EXAMPLE
    assert command("recipe", "--explain") == explain.explanation()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [([], "Usage"), (["run"], "RECIPE"), (["run", "a.yaml", "--nosuch"], "--nosuch"), (["rum"], "rum")],
    ids=["nothing", "no recipe", "unknown option", "unknown command"],
)
def test_usage(
    arguments: list[str], part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trimtab", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert part in printed.out + printed.err


def test_errors_take_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def read(*_: object) -> None:
        raise UserError("first\n  second\n\nthird")

    monkeypatch.setattr(planning, "as_recipe", read)
    monkeypatch.setattr(sys, "argv", ["trimtab", "plan", "a.yaml"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: first second third\n"


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(planning, "as_recipe", read)
    monkeypatch.setattr(sys, "argv", ["trimtab", "plan", "a.yaml"])
    with pytest.raises(ValueError, match="a bug"):
        cli.main()


def test_help_is_quick_to_import() -> None:
    """`trimtab --help` waits for nothing that only a run needs."""
    heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "pydantic"}
    probe = f"import sys, trimtab.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- the terminal -----------------------------------------------------------------------------------------------------


def terminal(*, tty: bool = False) -> tuple[Terminal, io.StringIO]:
    shown = Terminal()
    file = io.StringIO()
    shown.console = Console(file=file, force_terminal=tty, width=100, highlight=False, emoji=False)
    return shown, file


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "peak_bytes", lambda: 123_456_789)
    steps = [Step(i, 50, 4.5 - i / 50, 128 * i, 0.5 * i) for i in range(1, 51)]
    shown, file = terminal()
    for step in steps:
        shown.step(step)
    lines = file.getvalue().splitlines()
    assert len(lines) == 10  # a log file gets ten lines
    assert lines[-1] == "  step 50/50  loss 3.500  256 tok/s  123.5 MB"
    shown, file = terminal(tty=True)
    for step in steps:
        shown.step(step)
    assert "step 50/50" in file.getvalue()
    assert "256 tok/s" in file.getvalue()
    assert shown._progress is None


def test_results() -> None:
    shown, file = terminal()
    metrics = {
        "perplexity": {"float": 10.0, "rounded": None, "tuned": 9.5},
        "weights_changed_by_fold": 0,
        "moved_by_training": {"codes": 5, "of_codes": 2000, "groups": 30, "of_groups": 40},
        "fold_error": 0.0,
        "fold": "14 layers folded, bitwise",
        "peak_memory_bytes": 2_000_000_000,
        "disk_bytes": 999,
        "train_seconds": 2.0,
        "tokens": 100,
        "answers": {"after": "[red]4[/red] :smile:"},
        "output": "runs/[x]",
    }
    shown.finish(
        metrics, [Parity("folded", 0.0, 0.0, 1.0, 0.0, 9.5, True), Parity("reloaded", 0.5, 0.1, 0.9, 0.1, 9, False)]
    )
    printed = file.getvalue()
    for part in (
        "float (the untuned model)",
        "9.50",
        "2.00 GB",
        "999 B",
        "2 s, 100 tokens, 50 tok/s",
        "training moved 5 of 2,000 codes (0.2%), and scale or zero of 30 of 40 groups (75.0%)",
        "folding (14 layers folded, bitwise) then changed 0 weights",
        "answer after tuning: [red]4[/red] :smile:",
        "written to runs/[x]",
    ):
        assert part in printed
    assert "rounded" not in printed
    assert re.search(r"folded .*100\.00% .*yes", printed)
    assert re.search(r"reloaded .*90\.00% .*no", printed)
    shown.finish({"output": "runs/y"}, [])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (83_100_000, "83.1 MB"), (1.5e10, "15.00 GB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_the_example_recipes_parse() -> None:
    """Those that ship with the repository."""
    files = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
    assert files
    for file in files:
        parsed = recipe.read(file)
        assert yaml.safe_load(parsed.to_yaml())["name"] == parsed.name
        assert json.dumps(parsed.model_dump(mode="json", exclude={"method", "rules"}))


def test_prune(command: Command, given: Path, tmp_path: Path) -> None:
    options = (
        "--ratio",
        0.3,
        "--multiple-of",
        8,
        "--data",
        given / "data.jsonl",
        "--tokens",
        256,
        "--block-tokens",
        64,
    )
    shown = command("prune", given / "model", "--out", tmp_path / "out", *options, "--keep", "0,-1")
    report = json.loads((tmp_path / "out" / "pruning.json").read_text())
    before, after = report["parameters_before"], report["parameters"]
    assert f"parameters   {before:,} -> {after:,} ({1 - after / before:.1%} removed)" in shown
    assert f"MLP channels 128 -> {report['widths']['channels']} in each layer" in shown
    assert re.search(r"\d s, peak memory [\d.]+ [MG]B; written to ", shown)
    assert report["options"]["keep"] == [0, -1]
    # What came out is a model like any other, and by bytes as well as by ratio.
    command(
        "plan", tiny.write(tmp_path / "r.yaml", tiny.recipe(tmp_path / "out", given / "data.jsonl", tmp_path / "run"))
    )
    command("prune", given / "model", "--out", tmp_path / "small", "--bytes", "150kB", *options[2:])
    assert 0.8 * 150_000 < 2 * json.loads((tmp_path / "small" / "pruning.json").read_text())["parameters"] <= 150_000
    dropped = command("prune", given / "model", "--out", tmp_path / "short", "--drop-layers", 1, *options[2:])
    assert re.search(r"layers       2 -> 1 \(without [01]\)", dropped)


def test_something_to_look_at_before_anything_heavy() -> None:
    """A command draws before it imports torch, which takes seconds; where nobody looks it draws nothing."""
    probe = "import sys; from trimtab import cli; cli._terminal(); print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    shown, file = terminal(tty=True)
    shown.wait("loading [libraries]")
    shown.say("ready")
    assert "loading [libraries] ..." in file.getvalue()
    assert file.getvalue().endswith("ready\n")
    assert "\x1b[?25h" in file.getvalue(), "the cursor is back"


def test_the_waiting_ends_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, file = terminal(tty=True)

    def fails() -> None:
        cli._shown.append(shown)
        shown.wait("loading")
        raise UserError("wrong")

    monkeypatch.setattr(cli, "app", lambda **_: fails())
    with pytest.raises(SystemExit):
        cli.main()
    assert "\x1b[?25h" in file.getvalue()


@pytest.mark.parametrize("name", ["formats", "methods"])
@pytest.mark.parametrize("width", [60, 80, 120])
def test_tables_fit(name: str, width: int, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line is wider than the terminal, and no word is cut."""
    monkeypatch.setenv("COLUMNS", str(width))
    printed = command(name)
    assert max(map(len, printed.splitlines())) <= width
    assert "…" not in printed
    words = set(printed.replace(";", " ").replace(",", " ").split())
    asked = {"formats": {"compressed-tensors", "transformers"}, "methods": {"adapter_dtype=bfloat16", "lr-qat"}}
    assert asked[name] <= words


def test_widths() -> None:
    header, rows = ("", "what"), [("a name", "one two three")]
    assert tables.widths(header, rows, 40) == [6, 13]
    assert tables.widths(header, rows, 17) == [6, 7]
    assert tables.widths(header, rows, 14) is None
    assert tables.paragraphs(("format", "bits"), [("gguf", "2 3"), ("", "4")]) == ["gguf bits 2 3", "  bits 4"]
