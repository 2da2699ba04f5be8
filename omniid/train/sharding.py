"""Data parallelism: whole copies (DDP) or weights, gradients and optimizer state spread over processes (FSDP2).

Checkpoints hold whole tensors either way, so that a run may go on with another number of processes or the other kind.
FSDP2 is PyTorch's own `fully_shard`: accelerate's plugin for it does nothing on a CPU (1.15), where it is tested.
"""

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Spreads the module's parameters, gradients and optimizer state over all processes.

    Weights are gathered at once for a step, because blocks are called by their methods and a sample grid by one process;
    optimizer state and averages, three quarters of the memory, never are.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """This process's part of a whole tensor where `reference`, of the same shape, is spread; else the tensor."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements)


@contextlib.contextmanager
def gradients_shared(module: nn.Module, share: bool) -> Iterator[None]:
    """Within it, a backward pass averages gradients over processes, or leaves that to a later micro-batch."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(share)
        yield
    elif isinstance(module, nn.parallel.DistributedDataParallel) and not share:
        with module.no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within it, every process holds whole copies of all weights, for use without gradients and for export."""
    spread = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    for part, name, parameter in spread:
        setattr(part, name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
    try:
        yield
    finally:
        for part, name, parameter in spread:
            setattr(part, name, parameter)


def whole_on_cpu(tensors: dict, keep: bool) -> dict:
    """Whole copies on the CPU of the tensors in a dictionary, one gathered after another; nothing where not `keep`.

    Every process must ask.
    """
    copies = {}
    for name, value in tensors.items():
        if isinstance(value, dict):  # bitsandbytes keeps its 8-bit tensors one level down
            copies[name] = whole_on_cpu(value, keep)
            continue
        value = whole(value.detach()) if isinstance(value, Tensor) else value
        if keep:
            copies[name] = value.cpu() if isinstance(value, Tensor) else value
    return copies


def whole_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict:
    """The optimizer's state with whole tensors on the CPU; every process must ask, but only some need `keep` it."""
    state = optimizer.state_dict()
    return state | {"state": {index: whole_on_cpu(entry, keep) for index, entry in state["state"].items()}}


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads what `whole_state` gave, whatever part of it this process holds."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        index: {name: spread_like(value, parameters[index]) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict(state | {"state": entries})
