"""The terminal: progress with speed, memory and time left; tables of results. The only file that imports rich."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from trimtab import ranks
from trimtab.errors import UserError
from trimtab.memory import process
from trimtab.report import tables
from trimtab.words import duration, perplexity, size

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search
    from trimtab.evaluation.chat import Talk
    from trimtab.evaluation.comparing import Comparison
    from trimtab.evaluation.parity import Parity
    from trimtab.evaluation.serving import Served
    from trimtab.formats.export import Report
    from trimtab.memory.peak import Plan
    from trimtab.pipeline.evaluating import Accuracies
    from trimtab.pruning import Pruned
    from trimtab.training.overview import Overview
    from trimtab.training.trainer import Step

_TRAINING = (
    "loss {task.fields[loss]:.3f}{task.fields[held_out]}", "{task.fields[speed]:.0f} tok/s", "{task.fields[memory]}",
)  # fmt: skip


def movements(metrics: Mapping[str, Any]) -> list[str]:
    """What training moved of the codes, and that folding moved nothing more: two lines, since each alone misleads."""
    if "moved_by_training" not in metrics:
        return []
    moved, differing, error = (metrics[key] for key in ("moved_by_training", "weights_changed_by_fold", "fold_error"))
    lines = []
    if moved["of_codes"]:
        codes, groups = (
            f"{moved[what]:,} of {moved[f'of_{what}']:,} {name} ({moved[what] / moved[f'of_{what}']:.1%})"
            for what, name in (("codes", "codes"), ("groups", "groups"))
        )
        lines.append(f"training moved {codes}, and scale or zero of {groups}")
    by = f", by at most {error:.1e} of a layer's norm" if error else ""
    lines.append(f"folding ({metrics['fold']}) then changed {differing:,} weights{by}")
    return lines


class Terminal:
    """Shows a run as it goes."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, emoji=False, quiet=not ranks.is_first())
        self._progress: Progress | None = None
        self._live: Live | None = None
        self._status: Status | None = None
        self._said = self._held_out = ""

    def wait(self, text: str) -> None:
        """Something to look at from the first moment: libraries take seconds to load. Nothing where nobody looks."""
        if self.console.is_terminal and self._status is None:
            self._status = Status(f"{escape(text)} ...", console=self.console)
            self._status.start()

    def say(self, text: str) -> None:
        """A line about the stage that begins or has ended."""
        self.close()
        self.console.print(text, markup=False, soft_wrap=True)

    def step(self, step: "Step") -> None:
        """Advance the training bar."""
        speed = step.tokens / max(step.seconds, 1e-9)
        most = process.peak_bytes() if step.device_bytes is None else step.device_bytes
        fields: dict[str, Any] = {"loss": step.loss, "speed": speed, "memory": size(most)}
        if step.held_out is not None:
            self._held_out = f", held-out {step.held_out:.3f}"
        if not self.console.is_terminal:
            tenth = step.step == step.steps or step.step % max(step.steps // 10, 1) == 0
            if tenth or step.held_out is not None:
                loss = f"loss {step.loss:.3f}" + ("" if step.held_out is None else self._held_out)
                self.console.print(f"  step {step.step}/{step.steps}  {loss}  {speed:.0f} tok/s  {fields['memory']}")
            return
        fields["held_out"] = self._held_out
        if self._progress is None:
            columns = [TextColumn("step {task.completed}/{task.total}"), BarColumn(), *map(TextColumn, _TRAINING)]
            self._progress = Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=self.console)
            self._progress.start()
            self._progress.add_task("train", total=step.steps, **fields)
        self._progress.update(self._progress.task_ids[0], completed=step.step, **fields)
        if step.step >= step.steps:
            self.close()

    def pruned(self, done: "Pruned", out: str) -> None:
        """What pruning removed."""
        for line in done.lines():
            self.say(line)
        self.say(f"{done.seconds:.1f} s, peak memory {size(done.peak_bytes)}; written to {out}")

    def finish(self, metrics: Mapping[str, Any], parities: "Sequence[Parity]") -> None:
        """The results of a run."""
        self.close()
        self._perplexities(metrics.get("perplexity", {}), metrics.get("perplexity_of"))
        if metrics.get("tasks"):
            tasks = [(name, f"{v:.4f} ± {e:.4f}", str(n)) for name, (v, e, n) in metrics["tasks"].items()]
            self.rows("tasks, tuned", ("", "accuracy", "items"), tasks)
        self._parities(parities)
        for line in movements(metrics):
            self.say(line)
        table = Table(box=None, show_header=False, title="bytes and time", title_justify="left")
        for name in ("device_peak_memory_bytes", "peak_memory_bytes", "disk_bytes"):
            if metrics.get(name) is not None:
                table.add_row(name.removesuffix("_bytes").replace("_", " "), size(metrics[name]))
        if metrics.get("train_seconds"):
            speed = metrics["tokens"] / metrics["train_seconds"]
            table.add_row(
                "training", f"{metrics['train_seconds']:.0f} s, {metrics['tokens']} tokens, {speed:.0f} tok/s"
            )
        self.console.print(table)
        for when in ("before", "after"):
            answer = metrics.get("answers", {}).get(when)
            if answer is not None:
                self.console.print(f"\n[bold]answer {when} tuning:[/bold] {escape(answer)}", soft_wrap=True)
        took = f" in {duration(metrics['seconds'])}" if "seconds" in metrics else ""
        self.console.print(f"\nwritten to [bold]{escape(str(metrics['output']))}[/bold]{took}", soft_wrap=True)

    def _perplexities(self, values: Mapping[str, float | None], of: str | None) -> None:
        labels = {
            "float": "float (the untuned model)",
            "rounded": "rounded, before tuning",
            "tuned": "tuned, folded, reloaded",
        }
        table = Table(title="held-out perplexity", title_justify="left", box=None, show_header=False)
        for key, label in labels.items():
            value = values.get(key)
            if value is not None:
                table.add_row(label, f"{value:.2f}")
        if table.row_count:
            self.console.print(table)
            if of is not None:
                self.say(f"perplexity is that of {of}; training learns the answers alone")

    def _parities(self, parities: "Sequence[Parity]") -> None:
        if not parities:
            return
        table = Table(title="trained = folded = saved", title_justify="left", box=None)
        for column in ("", "max |d logit|", "rms", "top-1", "KL", "perplexity", "same bits"):
            table.add_column(column, justify="left" if not column else "right")
        for p in parities:
            table.add_row(
                p.stage,
                f"{p.max_difference:.3g}",
                f"{p.rms_difference:.3g}",
                f"{p.top1_agreement:.2%}",
                f"{p.kl:.3g}",
                f"{p.perplexity:.4f}",
                "yes" if p.identical else "no",
            )
        self.console.print(table)

    def plan(self, plan: "Plan") -> None:
        """The memory plan, whether it fits, what would, and the sizes of what is written."""
        from trimtab.report import planned

        for shown in planned.tables(plan, process.available_bytes(), size):
            if isinstance(shown, str):
                self.say(shown)
            else:
                self.rows(shown.title, shown.header, shown.rows)

    def data(self, found: "Overview") -> None:
        """What training will see of its data."""
        from trimtab.report.data_table import show

        show(self.console, found)

    def accuracies(self, found: "Accuracies") -> None:
        """Scores of one model or two, and their paired differences."""
        from trimtab.evaluation import harness

        for path, scores in found.scores.items():
            self.rows(path, ("task", "metric", "accuracy", "items"), harness.rows(scores))
        if len(found.scores) > 1:
            first, second = found.scores
            header = ("task", "metric", "difference", "only first / only second right", "p")
            rows = harness.difference_rows(found.differences)
            self.rows(f"{second} minus {first}, on the same items", header, rows)
        self.say(f"written to {found.out}")

    def served(self, found: "Served") -> None:
        """An engine against the trained model."""
        values = {name.replace("_", " "): value for name, value in vars(found).items()}
        rows = [(name, f"{v:.6g}" if isinstance(v, float) else str(v)) for name, v in values.items()]
        self.rows("served = trained", ("", ""), rows)

    def exported(self, report: "Report") -> None:
        """What an export did."""
        self.say(f"{report.format}: {report.kind}, {size(report.disk_bytes)}, written to {report.out}")
        if report.dense:
            few = ", ".join(report.dense[:3]) + (" ..." if len(report.dense) > 3 else "")
            self.say(f"written as float matrices, equal in the model's dtype: {len(report.dense)} layers ({few})")
        if report.kind != "exact":
            self.say(f"relative weight error {report.relative_error:.3g}; {len(report.changed)} layers rounded again")
        if report.perplexity:
            before, after = report.perplexity["before"], report.perplexity["after"]
            self.say(f"held-out perplexity {before:.4f} before, {after:.4f} as exported")
        elif report.unmeasured:
            self.say(f"held-out perplexity not measured: {report.unmeasured}")

    def search(self, search: "Search") -> None:
        """The front so far, in place on a terminal, else a line for each trial."""
        trials = search.ledger.trials()
        done = sum(t.state == "complete" for t in trials)
        running = sum(t.state == "running" for t in trials)
        failed = sum(t.state == "infeasible" for t in trials)
        left = search.seconds_left(trials)
        status = f"{done} trials done, {running} running, {failed} failed; hypervolume {search.hypervolume(trials):.4g}"
        status += "" if left is None else f"; about {left / 60:.0f} min left"
        if search.doubtful:
            status += "; waiting for a sign of life from other machines, two minutes at most"
        if not self.console.is_terminal:
            if status != self._said:
                self.console.print(f"  {status}")
            self._said = status
            return
        table = Table(box=None)
        for column in ("bytes", "loss" if search.block.objective == "tuned" else "KL", "mean bits", "trial"):
            table.add_column(column, justify="right")
        for t in search.front(trials)[-30:]:
            bits = sum(search.space.bits[c] for c in t.wish.configuration) / len(t.wish.configuration)
            table.add_row(size(t.bytes or 0), f"{t.quality:.4f}", f"{bits:.2f}", f"{t.number} {t.wish.kind}")
        if self._live is None:
            self._live = Live(console=self.console)
            self._live.start()
        self._live.update(Group(status, table))

    def searched(self, search: "Search") -> None:
        """Where the results of a search are, what its prior took, and whether it ended short."""
        self.close()
        took = search.ledger.noted("sensitivities")
        self.say(
            f"sensitivities took {took['passes']:.3g} passes over {took['tokens']:,} tokens, {took['seconds']:.0f} s"
        )
        if short := search.unmade(search.ledger.trials()):
            self.say(short)
        page = "report.html, " if (search.folder / "report.html").is_file() else ""
        if not page:
            self.say(
                "no report.html: its charts need pip install 'trimtab[report]'; then `trimtab report DIR` writes it"
            )
        self.say(
            f"{page}front.csv, points/*.yaml and pictures are in {search.folder}; `trimtab run` any point's recipe"
        )

    def compared(self, found: "Comparison") -> None:
        """Two models side by side."""
        sides = (("A", found.first), ("B", found.second))
        rows = [(name, side.path, perplexity(side.perplexity), size(side.bytes)) for name, side in sides]
        self.rows("", ("", "model", "perplexity", "files"), rows)
        self.rows("", ("", ""), [
            ("KL(A || B), nats a token", f"{found.kl:.4g} ± {found.kl_error:.2g}"),
            ("same likeliest token", f"{found.top1_agreement:.2%}"),
            ("loss of B minus that of A", f"{found.loss_difference:+.4f} ± {found.loss_error:.2g}"),
        ])  # fmt: skip

    def pieces(self, pieces: "Iterator[str]") -> None:
        """A text as it comes, and the end of its line."""
        try:
            for piece in pieces:
                self.close()
                self.console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            self.console.print(" ...", end="")
        self.close()
        self.console.print()

    def converse(self, talk: "Talk") -> None:
        """A conversation: a question a line, until an empty one; Ctrl-C breaks off an answer."""
        self.say("an empty line ends the conversation; /reset forgets it, /system TEXT tells the model something first")
        if not talk.templated:
            self.say("the model has no chat template: it continues your text")
        while question := self._asked():
            command, _, rest = question.partition(" ")
            if command in ("/reset", "/system"):
                try:
                    talk.system = talk.system if command == "/reset" else rest.strip() or None
                except UserError as error:
                    self.say(str(error))
                    continue
                talk.reset()
                self.say("forgotten" if command == "/reset" else "a new conversation begins")
            elif command in ("/exit", "/quit", "/bye"):
                return
            elif command.startswith("/"):
                self.say(f"{command} is none of /reset, /system, /exit")
            else:
                self.pieces(talk.say(question))
                if talk.forgotten:
                    self.say(f"(no room for the {talk.forgotten} oldest messages: they were left out)")

    def _asked(self) -> str:
        """The next line; "" where there is no more."""
        try:
            return self.console.input("> ").strip()
        except EOFError:
            return ""

    def rows(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Any table of text, whose words are read whole; paragraphs where the terminal is too narrow for it."""
        self.close()
        found = tables.widths(header, rows, self.console.width)
        if found is None:
            for line in [title, *tables.paragraphs(header, rows)] if title else tables.paragraphs(header, rows):
                self.console.print(Padding(Text(line), (0, 0, 0, 2 if line.startswith(" ") else 0)))
            return
        table = Table(title=title or None, title_justify="left", box=None, show_header=any(header))
        for column, width in zip(header, found, strict=True):
            table.add_column(column, width=width, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        self.console.print(table)

    def close(self) -> None:
        """Leave the terminal as it was: whatever is drawn in place stays as it is now, what only waits goes."""
        if self._status is not None:
            self._status.stop()
            self._status = None
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._live is not None:
            self._live.stop()
            self._live = None
