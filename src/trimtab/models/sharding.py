"""FSDP2: each of several processes keeps a part of every layer, and gathers the whole of it while it is used.

    tt.load(..., shard=True)    each decoder block is sharded as soon as it is read, so that no process ever has them all
    tt.shard(model, mesh)       a decoder block a unit, and what lies outside the blocks with the model itself; in place
    tt.gather(model)            the whole model again: in the first process, on the CPU; None in the others

Codes, scales and zeros are parameters like factors are, so all of them are sharded, bytes as bytes. Nothing may be cast on
the way (`param_dtype` of FSDP2's mixed precision): a cast changes codes.

A sharded model is trained and asked; what needs the weights themselves (fold, save, export) is for the whole one. For that
the model's modules are copied without their tensors before they are sharded, and tensors come into that copy one at a time,
so that no GPU holds the whole.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab import processes
from trimtab.errors import UserError
from trimtab.models.decoder import blocks
from trimtab.models.prepared import quant_layers
from trimtab.models.transformers_bridge import settle

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

_SKELETON = "_trimtab_skeleton"


def is_sharded(model: nn.Module) -> bool:
    """Whether the model went through `shard`."""
    return _SKELETON in vars(model)


class Parting:
    """Parts a model bit by bit: each decoder block once all of it is there, and what lies outside the blocks at the end.

    Args:
        mesh: of torch; every process does the same at the same time.
        options: of `torch.distributed.fsdp.fully_shard`.
    """

    def __init__(self, mesh: "DeviceMesh", **options: Any) -> None:
        self._mesh, self._options = mesh, options
        self._copies: dict[int, Any] = {}
        """The sharded blocks without their tensors, by the blocks' `id`."""

    def has(self, block: nn.Module) -> bool:
        """Whether a decoder block is sharded."""
        return id(block) in self._copies

    def block(self, block: nn.Module) -> None:
        """Part a decoder block, whose parameters are on the mesh's device, and frozen where they are not trained."""
        from torch.distributed.fsdp import fully_shard

        self._copies[id(block)] = _without_tensors(block)
        fully_shard(block, mesh=self._mesh, **self._options)

    def rest(self, model: nn.Module) -> None:
        """Part the blocks that are not yet, and all that lies outside of them."""
        from torch.distributed.fsdp import fully_shard

        for block in blocks(model):
            if not self.has(block):
                self.block(block)
        skeleton = _without_tensors(model, self._copies)
        if quant_layers(skeleton):
            settle(skeleton)
        fully_shard(model, mesh=self._mesh, **self._options)
        vars(model)[_SKELETON] = skeleton


def mesh_of(kind: str) -> "DeviceMesh":
    """All processes in one row, on devices of this kind.

    Raises:
        UserError: where processes were not started, or have not met.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if not torch.distributed.is_initialized():
        raise UserError(
            "shard: there is one process; start several (torchrun --nproc_per_node 2 ...) and call "
            "torch.distributed.init_process_group()"
        )
    return init_device_mesh(kind, (processes.count(),))


def shard(model: "PreTrainedModel", mesh: "DeviceMesh | None" = None, **options: Any) -> "PreTrainedModel":
    """Shard a prepared model among the processes, in place (FSDP2). `load(..., shard=True)` does it while it reads.

    Args:
        model: from `prepare` or `load`, the same in every process.
        mesh: torch's device mesh; None for all processes in one row, on the GPUs if there are any.
        options: of `torch.distributed.fsdp.fully_shard`, such as `reshard_after_forward` and `offload_policy`.

    Returns:
        The model itself, with other parameters of the same names: an optimizer is made of those.

    Raises:
        UserError: where parameters are to be cast, or processes were not started.

    Examples:
        >>> tt.shard(model)
        >>> optimizer = torch.optim.AdamW(tt.param_groups(model, steps=300))
    """
    if is_sharded(model):
        raise UserError("shard: the model is sharded already")
    policy: Any = options.get("mp_policy")
    if getattr(policy, "param_dtype", None) is not None and quant_layers(model):
        raise UserError(
            f"shard: mp_policy.param_dtype = {policy.param_dtype}: would cast codes and scales, and so change the model; "
            "it computes in its own dtype: leave param_dtype out"
        )
    Parting(mesh or mesh_of("cuda" if torch.cuda.is_available() else "cpu"), **options).rest(model)
    return model


def skeleton_of(model: nn.Module) -> Any:
    """The modules of a sharded model as they were, without their tensors; None of a model that is not sharded."""
    return vars(model).get(_SKELETON)


def _without_tensors(model: nn.Module, copies: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of the modules alone: parameters lie on the meta device, and what is copied already is taken from `copies`.

    Modules ask the config that the whole model has. So the copy of a block by itself (`copies` is None) keeps the original,
    until the rest is copied, and the config with it as it is by then: one copy for all of them.
    """
    parted = copies or {}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for module in _modules(model, parted)
        for p in module.parameters(recurse=False)
    }
    memo |= parted
    if copies is None:
        memo |= {id(config): config for module in model.modules() for _, config in _configs(module)}
    made = copy.deepcopy(model, memo)
    for module in (module for block in parted.values() for module in block.modules()):
        vars(module).update({name: copy.deepcopy(config, memo) for name, config in _configs(module)})
    vars(made).pop("forward", None)  # a trainer's, which would call the model that is sharded
    return made


def _configs(holder: Any) -> list[tuple[str, Any]]:
    """What a module, or a config of several parts, holds of transformers' configs, by name."""
    from transformers import PreTrainedConfig

    return [(name, value) for name, value in vars(holder).items() if isinstance(value, PreTrainedConfig)]


def _become(config: Any, other: Any) -> None:
    """Take another config's values, and let parts be the objects that they are: modules hold them."""
    parts = dict(_configs(config))
    for name, value in vars(other).items():
        if name in parts and type(value) is type(parts[name]):
            _become(parts[name], value)
        else:
            vars(config)[name] = copy.deepcopy(value)


def _modules(model: nn.Module, parted: Mapping[int, Any]) -> Iterator[nn.Module]:
    """A module and all in it, but for what is sharded."""
    if id(model) in parted:
        return
    yield model
    for child in model.children():
        yield from _modules(child, parted)


def parameters_now(before: dict[int, str], model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with the parameters that a sharded model has in place of those that it had.

    Args:
        before: names by the parameters' `id`, from before it was sharded.
        model: sharded.
        groups: as `torch.optim` takes them.
    """
    now = dict(model.named_parameters())
    return [group | {"params": [now[before[id(p)]] for p in group["params"]]} for group in groups]


def to_first(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, on the CPU, in the first process; every process has to ask.

    The others get an empty one: of tensors that are asked for one after another no GPU holds more than one whole.
    """
    from torch.distributed.tensor import DTensor

    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.cpu().contiguous() if processes.is_first() else torch.empty(0, dtype=tensor.dtype)


def like(tensor: Tensor, whole: Tensor) -> Tensor:
    """`whole`, which every process has, parted as `tensor` is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole.to(tensor.device), tensor.device_mesh, tensor.placements)


@torch.no_grad()
def gather(model: "PreTrainedModel") -> "PreTrainedModel | None":
    """Gather a sharded model in the first process, one tensor at a time.

    Args:
        model: every process has to call this; the model is left as it is. One that is not sharded is returned as it is in
            the first process.

    Returns:
        In the first process a model on the CPU, as it was before `shard`, with what was trained since; None in the others.

    Examples:
        >>> whole = tt.gather(model)  # None but in the first process
    """
    from torch.distributed.fsdp import FSDPModule

    if not is_sharded(model):
        return model if processes.is_first() else None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    first = processes.is_first()
    whole: Any = copy.deepcopy(vars(model)[_SKELETON]) if first else None
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in made:
            kept = to_first(parameter.detach())
            made[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        if first:
            path, _, own = name.rpartition(".")
            whole.get_submodule(path).register_parameter(own, made[id(parameter)])
    if not first:
        return None
    _become(whole.config, model.config)  # a trainer has its say in both
    whole.generation_config = copy.deepcopy(model.generation_config)
    for name, buffer in model.named_buffers():
        path, _, own = name.rpartition(".")
        setattr(whole.get_submodule(path), own, buffer.detach().cpu())
    whole.train(model.training)
    found: PreTrainedModel = whole
    return found
