"""The folder of a run while it is made: beside its output, which it replaces when it is whole.

    <output>.unfinished/recipe.yaml       the run's recipe, with the hashes of what it reads: `--resume` reads the same
    <output>.unfinished/blocks            what a block-wise start came to, block by block; removed in the end
    <output>.unfinished/checkpoints       of training, with what was measured before; moved into the output in the end
    <output>.unfinished/model             what the output will hold

The earlier run stays until then. A run that is stopped leaves the folder if there is a checkpoint in it, which `--resume`
continues from and `--overwrite` removes, or a block of a start, which any later run takes if it is what it needs, and only
then; without either there is nothing to keep, and the next run starts over.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.errors import UserError
from trimtab.formats.directory import check_replaceable, put_in_place, to_oneself
from trimtab.formats.manifest import entries, kind_of, remove, write_manifest
from trimtab.outputs import output, resolved
from trimtab.recipe.recipe import Recipe
from trimtab.training.checkpoints import Found, checkpoints_in, find, whole_checkpoint
from trimtab.training.saving import tidy
from trimtab.words import and_more

_OURS = (
    "recipe.yaml", "model/", "blocks/", "checkpoints/checkpoint-", "checkpoints/best/", "checkpoints/measured.json",
    "checkpoints/runs/", "checkpoints/.writing/", "checkpoints/.best", "checkpoints/.checkpoint-",
)  # fmt: skip
"""What names begin with that a run writes into its folder."""
_REMEDY = "move or remove it yourself, or set `output`"


@dataclass(frozen=True)
class Work:
    """Where a run is made."""

    out: Path
    """Its output, absolute."""

    @classmethod
    def of(cls, recipe: Recipe) -> "Work":
        """The folders of a recipe's run."""
        return cls(resolved(recipe.out))

    @property
    def folder(self) -> Path:
        """What a stopped run leaves."""
        return self.out.with_name(f"{self.out.name}.unfinished")

    @property
    def checkpoints(self) -> Path:
        """Where training keeps its checkpoints."""
        return self.folder / "checkpoints"

    @property
    def blocks(self) -> Path:
        """Where a block-wise start keeps what it found."""
        return self.folder / "blocks"

    @property
    def model(self) -> Path:
        """What becomes the output."""
        return self.folder / "model"

    @property
    def stopped_at(self) -> Path | None:
        """The last checkpoint of a stopped run."""
        return whole_checkpoint(self.checkpoints)

    def found(self) -> Found:
        """The checkpoints that `--resume` looks at: of the stopped run, else of the finished one."""
        return find(self.checkpoints if any(checkpoints_in(self.checkpoints)) else self.out / "checkpoints")

    def last(self) -> Path | None:
        """The one of them that it continues from."""
        return self.found().last

    def check(self, overwrite: bool, resume: bool) -> None:
        """Raise a `UserError` if something is in the way of a run, unless told what to do with it."""
        if overwrite and resume:
            raise UserError("--overwrite removes what --resume continues from; pass one of them")
        output(self.out)
        self._check_stopped(overwrite, resume)
        if resume and (found := self.found()).last is None:
            if not self.out.exists() and not self.folder.exists():
                raise UserError(f"--resume: {self.out} does not exist; run without it")
            if found.damaged:
                raise UserError(f"--resume: no checkpoint is whole: {'; '.join(found.lines)}. Start over (--overwrite)")
            where = self.checkpoints if self.folder.exists() else self.out / "checkpoints"
            raise UserError(f"--resume: {where} holds no checkpoint; run without it")
        if self.out.exists() and any(self.out.iterdir()) and not (overwrite or resume):
            raise UserError(
                f"output: {self.out} is not empty; pass --overwrite to replace it, --resume to continue it, or set `output`"
            )
        check_replaceable(self.out, "run", overwrite=True, remedy="set `output`")

    def _check_stopped(self, overwrite: bool, resume: bool) -> None:
        """Look at what an earlier run left beside the output."""
        if not self.folder.exists():
            return
        if any(self.folder.iterdir()) and kind_of(self.folder) != "unfinished":
            raise UserError(f"output: {self.folder} is in the way, and trimtab did not write it; {_REMEDY}")
        foreign = [name for name in entries(self.folder) if not name.startswith(_OURS)]
        if foreign:
            raise UserError(f"output: {self.folder} holds {and_more(foreign)}, which trimtab did not write; {_REMEDY}")
        if overwrite or resume:
            return
        if self.stopped_at is not None:
            raise UserError(
                f"output: an earlier run was stopped, and {self.stopped_at} is what it reached; pass --resume to continue, "
                "--overwrite to start over, or set `output`"
            )
        if damaged := find(self.checkpoints).lines:
            raise UserError(f"output: of an earlier run, {damaged[0]}; pass --overwrite to start over, or set `output`")

    @contextmanager
    def begun(self, recipe: Recipe, overwrite: bool, resume: bool) -> Iterator[None]:
        """Have the output, and its folder beside it, to oneself; what is left of it then is worth keeping.

        Args:
            recipe: as it will be saved.
            overwrite: start over.
            resume: continue from the last checkpoint.
        """
        with to_oneself(self.out):
            self.check(overwrite, resume)
            if overwrite or self._holds_nothing():  # what a run left that could not clear up
                self._clear()
            self._make(recipe, resume)
            try:
                yield
            finally:
                if self._holds_nothing():
                    self._clear()

    def _holds_nothing(self) -> bool:
        """Whether no later run could continue from what is here; a damaged checkpoint is for people to look at."""
        return not any(checkpoints_in(self.checkpoints)) and not any(self.blocks.glob("*.safetensors"))

    def _clear(self) -> None:
        """Remove what a run made in its folder; a file that somebody put there meanwhile stays."""
        if self.folder.exists():
            # Nothing is written for it: that would fail where the disk is full.
            remove(self.folder, [name for name in entries(self.folder) if name.startswith(_OURS)])

    def _make(self, recipe: Recipe, resume: bool) -> None:
        """The folder, under its name only when it is whole: one without a manifest is nobody's."""
        new = self.folder.with_name(f".{self.folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed here
        if not self.folder.exists():
            new.mkdir()
            write_manifest(new, "unfinished")
            if resume:  # a finished run continues
                shutil.copytree(self.out / "checkpoints", new / "checkpoints", copy_function=_linked)
            os.replace(new, self.folder)
        tidy(self.checkpoints)
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir()
        (self.folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")

    def finish(self) -> None:
        """The run is whole: put it in place of what was there."""
        shutil.rmtree(self.blocks, ignore_errors=True)
        checkpoints = [f"checkpoints/{name}" for name in entries(self.checkpoints)]
        put_in_place(self.model, self.out, "run", checkpoints)
        if self.checkpoints.exists():
            os.replace(self.checkpoints, self.out / "checkpoints")


def _linked(source: str, target: str) -> None:
    """A second name for a file, which nobody changes in place; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
