"""Which tensors of a checkpoint each tensor of a model is made of, and how: transformers' own answer.

A checkpoint names its tensors as its authors did. transformers renames them (a prefix more or less, `embed_out` for
`lm_head`), and makes some out of several (the experts of a layer become one tensor). Its rules and its functions are used
here, one tensor of the model at a time: `from_pretrained` would read the whole model first. Before a number is read, every
conversion is made once on the meta device, so that what is missing, unexpected or of another shape is known by name.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.utils.loading_report import LoadStateDictInfo

from trimtab.devices import CPU, kept_as
from trimtab.errors import UserError
from trimtab.layers.experts import Stack, closed, stacks
from trimtab.models.checkpoint import Checkpoint
from trimtab.models.opening import closed_experts
from trimtab.models.transposed import is_transposed


@dataclass(frozen=True)
class _Made:
    """One conversion: some tensors of the checkpoint in, one or several of the model out."""

    first: str
    """The first tensor of the model that comes out; its dtype is the dtype of what goes in."""
    rule: WeightRenaming | WeightConverter
    parts: list[tuple[str, str]] = field(default_factory=list)
    """What goes in: the rule's pattern, and the name in the checkpoint."""

    def convert(self, tensors: dict[str, Tensor], shapes: "_Shapes") -> dict[str, Tensor]:
        """What comes out of these tensors, by its name in the model."""
        if isinstance(self.rule, WeightRenaming):
            return {self.first: tensors[self.parts[0][1]]}
        rule = copy.deepcopy(self.rule)
        for pattern, name in self.parts:
            rule.add_tensor(self.first, name, pattern, tensors[name])  # type: ignore[arg-type]
        made = rule.convert(self.first, model=shapes, config=shapes.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


class _Shapes:
    """All that conversions ask of a model. The model itself changes while it is read."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config = model.config
        self.tensors: dict[str, Tensor] = {name: t.to("meta") for name, t in model.state_dict().items()}

    def get_parameter(self, name: str) -> Tensor:
        return self.tensors[name]


class Conversion:
    """A checkpoint as the tensors of a model.

    Args:
        checkpoint: what is read.
        model: on the meta device, in the dtypes that transformers would load it in. Tensors that transformers ties, but
            that the checkpoint holds twice with other numbers, are untied in it, as transformers does.

    Raises:
        UserError: naming the first tensor that is unexpected, quantized, of another shape or missing.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self._checkpoint, self._shapes = checkpoint, _Shapes(model)
        self._stacks: dict[str, Stack] = {
            f"{name}.{s.name}": s for name, module in closed_experts(model) for s in stacks(module)
        }
        self._transposed = {f"{name}.weight" for name, module in model.named_modules() if is_transposed(module)}
        self._by_target: dict[str, _Made] = {}
        self._stands_for: dict[str, str] = {}
        self.absent: set[str] = set()
        """Tensors of the model that no file holds, and of which transformers says that none need hold them."""
        mapping = get_model_conversion_mapping(model, None, getattr(model, "hf_quantizer", None))
        made, unexpected = self._assigned(model, mapping)
        for one in made:
            self._check_kinds(one)
            for name, result in self._tried(one, model).items():
                along = name in self._transposed and not self._lies_turned(one, name)
                self._check_shape(one, name, result.T if along else result, model)
                self._by_target[name] = one
        self._report(model, unexpected)
        self._tie(model)
        # What `save_pretrained` undoes.
        model._weight_conversions = [rule for rule in mapping if rule.was_used()]  # type: ignore[assignment]

    def _assigned(
        self, model: PreTrainedModel, mapping: list[WeightTransform]
    ) -> tuple[Iterable[_Made], dict[str, str]]:
        """Each tensor of the checkpoint in its conversion; and names that lead nowhere, with theirs in the checkpoint.

        The steps are those of transformers' `convert_and_load_state_dict_in_model`.
        """
        renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        wanted: dict[str, Tensor] = self._shapes.tensors
        prefix = model.base_model_prefix
        made: dict[str, _Made] = {}
        unexpected: dict[str, str] = {}
        for name in sorted(self._checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
            if target not in wanted and name in wanted:
                target, pattern = rename_source_key(name, [], [], prefix, wanted)
            if target not in wanted:
                unexpected[target] = name
            elif pattern is None:
                made.setdefault(target, _Made(target, WeightRenaming(name, target))).parts.append((name, name))
            else:
                made.setdefault(target, _Made(target, of_pattern[pattern])).parts.append((pattern, name))
        return made.values(), unexpected

    # ---- what can be wrong ------------------------------------------------------------------------------------------

    def _check_kinds(self, made: _Made) -> None:
        for _, name in made.parts:
            stored = self._checkpoint.tensors[name]
            if self._shapes.tensors[made.first].is_floating_point() and not stored.is_float:
                raise UserError(
                    f"{stored.file}: {name} is stored as {stored.kind}, which means nothing without a scale; "
                    "start from the float model, whose tensors are F32, F16, BF16 or F64"
                )
            if stored.dtype is None:
                raise UserError(f"{stored.file}: {name} is stored as {stored.kind}; start from the float model")

    def _tried(self, made: _Made, model: PreTrainedModel) -> dict[str, Tensor]:
        """What comes out, on the meta device."""
        dtype = self._shapes.tensors[made.first].dtype
        inputs = {
            name: torch.empty(self._checkpoint.tensors[name].shape, dtype=dtype, device="meta")
            for _, name in made.parts
        }
        alone = isinstance(made.rule, WeightRenaming)
        stranger = made.parts[1:] if alone else [p for p in made.parts if p[0] not in made.rule.source_patterns]
        if stranger:
            raise UserError(
                f"{self._checkpoint.path}: tensors {made.parts[0][1]} and {stranger[0][1]} are both {made.first} of the "
                "model; take the one that is not the model's out of the files"
            )
        try:
            return made.convert(inputs, self._shapes)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            self._require_parts(made, model)
            names = ", ".join(name for _, name in made.parts[:3])
            raise UserError(
                f"{self._checkpoint.path}: no {made.first} can be made of {names} ({error}); "
                "the checkpoint is incomplete or of another model, fetch or save it again"
            ) from error

    def _require_parts(self, made: _Made, model: PreTrainedModel) -> None:
        """Raise for the first tensor that transformers would save this one as, and that no file holds."""
        if isinstance(made.rule, WeightRenaming):
            return
        saved = revert_weight_conversion(model, {made.first: self._shapes.tensors[made.first]})
        for name in sorted(saved.keys() - self._checkpoint.tensors.keys(), key=dot_natural_key):
            raise self.lacking(name)

    def lacking(self, name: str) -> UserError:
        """The error that no file holds this tensor."""
        return UserError(
            f"{self._checkpoint.path}: no tensor {name} in its safetensors; the checkpoint is incomplete, "
            "fetch or save it again"
        )

    def _check_shape(self, made: _Made, name: str, result: Tensor, model: PreTrainedModel) -> None:
        wanted = self._shapes.tensors.get(name)
        if wanted is not None and wanted.shape != result.shape:
            self._require_parts(made, model)
        if wanted is not None and wanted.shape != result.shape:
            raise UserError(
                f"{self._checkpoint.path}: {name} has shape {tuple(result.shape)}, the config says {tuple(wanted.shape)}; "
                "the checkpoint is of another model, fetch it again"
            )

    def _report(self, model: PreTrainedModel, unexpected: dict[str, str]) -> None:
        """Raise for what transformers would only warn of, by its own lists of what need not be there."""
        unexpected |= {
            name: made.parts[0][1] for name, made in self._by_target.items() if name not in self._shapes.tensors
        }
        missing = self._shapes.tensors.keys() - self._by_target.keys()
        for group in _tied(model):
            if not missing.issuperset(group):
                missing -= set(group)
        info = LoadStateDictInfo(set(missing), set(unexpected), set(), [], {}, set())
        model._adjust_missing_and_unexpected_keys(info)
        for name in sorted(info.missing_keys, key=dot_natural_key):
            raise self.lacking(name)
        for name in sorted(info.unexpected_keys, key=dot_natural_key):
            held = unexpected[name]
            raise UserError(
                f"{self._checkpoint.tensors[held].file}: tensor {held} is not a part of the {type(model).__name__} that "
                "config.json describes, which would be computed without it; "
                "take the config.json that was saved with the weights, or start from the float model if they are quantized"
            )
        self.absent = set(missing)

    def _tie(self, model: PreTrainedModel) -> None:
        """Of tensors that share one parameter, the one that is read is the one that is there."""
        for group in _tied(model):
            there = [name for name in group if name in self._by_target]
            for name in there[1:]:
                dtype = self._shapes.tensors[name].dtype
                if not torch.equal(self.read(there[0], dtype), self.read(name, dtype)):
                    del model.all_tied_weights_keys[name]
                    _untie(model, name)
            self._stands_for |= {name: there[0] for name in group if name not in self._by_target and there}

    def source_of(self, name: str) -> str | None:
        """The checkpoint's name of a tensor of the model that stands there as it is; None of one that is made of others."""
        made = self._by_target.get(self._stands_for.get(name, name))
        return made.parts[0][1] if made is not None and isinstance(made.rule, WeightRenaming) else None

    # ---- reading ----------------------------------------------------------------------------------------------------

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device = CPU) -> Tensor:
        """The tensor of this name in the model, a copy; the matrix of a layer that is `transposed` as (N, K).

        Args:
            name: as the model calls it.
            dtype: cast what it is made of to this first, as transformers does; None leaves the numbers of the file.
            device: where it is made: what it is made of goes there first.
        """
        name = self._stands_for.get(name, name)
        of_stack = None if name in self._by_target else closed(name)
        if of_stack is not None and of_stack[0] in self._by_target:
            return self._expert(*of_stack, dtype, device)
        if name not in self._by_target:
            raise self.lacking(name)
        made = self._by_target[name]
        mapped = self._checkpoint.mapped(part for _, part in made.parts)
        found = self._converted(made, name, mapped, dtype, device)
        return found.T.contiguous() if self._lies_turned(made, name) else found

    def _lies_turned(self, made: _Made, name: str) -> bool:
        """Whether the files hold a matrix as (K, N): floats of a layer that is `transposed`, never codes."""
        return name in self._transposed and not self._checkpoint.tensors[made.parts[0][1]].packed

    def _expert(self, name: str, expert: int, dtype: torch.dtype | None, device: torch.device) -> Tensor:
        """One matrix, or one bias, of a stack of experts. No other expert is read where the files hold each by itself, or
        hold the stack.
        """
        made, stack = self._by_target[name], self._stacks.get(name)
        alone, wanted = self._alone(made, expert), self._shapes.tensors[name].shape
        found = None if alone is None else self._converted(alone[0], name, alone[1], dtype, device)
        if found is None or found.shape != (1, *wanted[1:]):
            mapped = self._checkpoint.mapped(part for _, part in made.parts)
            found = self._converted(made, name, mapped, dtype, device)[expert : expert + 1]
        matrix = found[0].T if stack is not None and stack.is_transposed else found[0]
        return matrix.clone(memory_format=torch.contiguous_format)

    def _alone(self, made: _Made, expert: int) -> tuple[_Made, dict[str, Tensor]] | None:
        """The conversion of one expert to a stack of one, and what goes in; None where the files hold it otherwise."""
        wanted = self._shapes.tensors[made.first].shape
        of_pattern: dict[str, list[str]] = {}
        for pattern, name in made.parts:
            of_pattern.setdefault(pattern, []).append(name)
        parts, cut = [], set[str]()
        for pattern, names in of_pattern.items():
            if len(names) == wanted[0] > 1:
                parts.append((pattern, names[expert]))
            elif len(names) == 1 and self._checkpoint.tensors[names[0]].shape[:1] == wanted[:1]:
                parts.append((pattern, names[0]))
                cut.add(names[0])
            else:
                return None
        mapped = self._checkpoint.mapped(name for _, name in parts)
        taken = {name: t[expert : expert + 1] if name in cut else t for name, t in mapped.items()}
        return _Made(made.first, made.rule, parts), taken

    def _converted(
        self, made: _Made, name: str, mapped: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
    ) -> Tensor:
        tensors = {part: t.to(device, kept_as(dtype or t.dtype, device)) for part, t in mapped.items()}
        found = made.convert(tensors, self._shapes)[name]
        # What is mapped would change with its file, and a part of something larger would keep all of it.
        alone = all(tensors[part] is not mapped[part] for part in mapped)
        whole = found.untyped_storage().nbytes() == found.numel() * found.element_size()
        return found if alone and whole else found.clone()


def require_names_that_last(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Raise a `UserError` for a layer of ours whose tensors would be saved under names that do not lead back to it.

    Saving undoes a family's renamings, and some of these end in a name that ours begin with.
    """
    starts = tuple(f"{name}." for name in layers)
    wanted = {name: t.to("meta") for name, t in model.state_dict().items() if name.startswith(starts)}
    wanted = {name: t for name, t in wanted.items() if name.removesuffix("weight") not in starts}  # the markers
    mapping = get_model_conversion_mapping(model, None, getattr(model, "hf_quantizer", None))
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    prefix = model.base_model_prefix
    reached = {
        target
        for name in _reverted(model, wanted, starts)
        for target in (
            rename_source_key(name, renamings, converters, prefix, wanted)[0],
            rename_source_key(name, [], [], prefix, wanted)[0],
        )
    }
    for name in sorted(wanted.keys() - reached, key=dot_natural_key):
        raise _lost(next(start for start in starts if name.startswith(start)), "renames", model)


def _reverted(model: PreTrainedModel, wanted: dict[str, Tensor], starts: Iterable[str]) -> Iterable[str]:
    """The names that these tensors of layers are saved under.

    Where transformers cannot save all of them together, each layer is asked for, to name the one that is to blame.
    """
    try:
        return list(revert_weight_conversion(model, dict(wanted)))
    except (RuntimeError, ValueError, LookupError, TypeError):
        found: list[str] = []
    for start in starts:
        own = {name: t for name, t in wanted.items() if name.startswith(start)}
        try:
            found += revert_weight_conversion(model, own)
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise _lost(start, "converts", model) from error
    return found


def _lost(start: str, does: str, model: PreTrainedModel) -> UserError:
    layer = start.removesuffix(".")
    return UserError(
        f"{layer}: transformers {does} it while saving ({type(model).__name__}), and what is saved could not be loaded "
        f"again; keep it in float with a rule, before the others: {{match: '*.{layer.rpartition('.')[2]}', grid: null}}"
    )


def _tied(model: PreTrainedModel) -> list[list[str]]:
    """Names that stand for one parameter, first the one that the others are said to be tied to."""
    groups: dict[str, list[str]] = {}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(source, [source]).append(target)
    return list(groups.values())


def _untie(model: PreTrainedModel, name: str) -> None:
    """Give this name a parameter of its own."""
    module, _, last = name.rpartition(".")
    owner: Any = model.get_submodule(module)
    shared = getattr(owner, last)
    setattr(owner, last, torch.nn.Parameter(torch.empty_like(shared), requires_grad=False))
