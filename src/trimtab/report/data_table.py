"""What training will see of its data, for the terminal."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trimtab.training.overview import Overview, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence


def show(console: Console, found: Overview) -> None:
    """Print numbers, the first example with what is learned of it in another colour, and notes."""
    table = Table(title="training data", title_justify="left", box=None, show_header=False)
    for name, value in _numbers(found):
        table.add_row(name, value)
    console.print(table)
    console.print(
        Text("\nfirst example, ") + Text("learned", style="bold green") + Text(" and given; marks ⟦ ⟧ are ours")
    )
    console.print(_example(found.example), soft_wrap=True)
    for note in found.notes:
        console.print(note, markup=False, soft_wrap=True)


def _numbers(found: Overview) -> Iterator[tuple[str, str]]:
    for source in found.sources:
        times = "" if source.weight == 1 else f", {source.weight:g} times"
        yield f"{source.path}", f"{source.rows:,} rows{times}"
    yield "trained on", f"{found.rows:,} {found.kind}"
    yield "held out", f"{found.held_out:,} rows, {found.near_duplicates:,} near duplicates dropped"
    yield "tokens", f"{found.tokens:,}, {found.share:.1%} of them learned"
    yield "longest", f"{found.longest:,} tokens, of {found.block_tokens:,}"
    yield "cut", f"{found.cut:,} rows"
    yield "left out", f"{found.left_out:,} rows"
    yield "sequences", f"{found.sequences:,} in an epoch (packing: {found.packing})"
    yield "steps", f"{found.steps:,} ({found.steps_an_epoch:,} an epoch: {found.epochs:.3g} epochs)"


def _example(parts: "Sequence[tuple[str, bool]]") -> Text:
    text = Text()
    for part, learned in parts:
        text += Text(f"⟦{shortened(part)}⟧", style="bold green") if learned else Text(shortened(part))
    return text
