"""Losses of DTensors, whose samples lie on the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .ops.shapes import accumulation_dtype


def is_dtensor(value: object) -> bool:
    # By name: the module of the class takes a second to import, and whoever has a DTensor has imported it.
    return type(value).__name__ == "DTensor"


def by_rows(loss: Callable[..., Tensor], mask: Tensor | None = None, **tensors: Tensor) -> Tensor:
    """Return a mean over samples. Every rank computes what its own samples add.

    Args:
        loss: the mean of plain tensors, which it takes in the order of ``tensors``, and ``mask=`` if there is a mask.
        mask: the samples that count, placed like the tensors. None counts all samples.
        tensors: at least one of them is a DTensor. All must be DTensors of one mesh with equal placements, which
            replicate them or shard their first dimension.

    Returns:
        A replicated DTensor, a scalar.

    Raises:
        TypeError: if they are placed otherwise, saying what to gather.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    first_name, first = next((name, x) for name, x in tensors.items() if isinstance(x, DTensor))
    mesh, placements = first.device_mesh, first.placements
    if not all(place.is_replicate() or place.is_shard(0) for place in placements):
        raise TypeError(
            f"{first_name} must be replicated or sharded over samples, Shard(0), got placements {placements}: pass "
            f"{first_name}.redistribute(placements=[Replicate()] or [Shard(0)])"
        )
    for name, x in (tensors if mask is None else {**tensors, "mask": mask}).items():
        if not isinstance(x, DTensor):
            raise TypeError(
                f"{name} must be a DTensor as {first_name} is, got a plain tensor: pass torch.distributed.tensor."
                f"distribute_tensor({name}, {first_name}.device_mesh, {first_name}.placements)"
            )
        if x.device_mesh != mesh or x.placements != placements:
            raise TypeError(
                f"{name} must have {first_name}'s mesh and placements {placements}, got {x.placements} on "
                f"{x.device_mesh}: pass {name}.redistribute({first_name}.device_mesh, {first_name}.placements)"
            )
    own: list[Tensor] = [x.to_local() for x in tensors.values() if isinstance(x, DTensor)]
    if isinstance(mask, DTensor):
        own_mask, counted = mask.to_local(), mask.sum()
        assert isinstance(counted, DTensor)
        share = own_mask.sum().double() / counted.full_tensor().clamp(min=1)
    if len(own[0]) and mask is not None:
        value = loss(*own, mask=own_mask)
        value = value * share.to(value.dtype)
    elif len(own[0]):
        value = loss(*own) * (len(own[0]) / len(first))
    else:  # a rank without samples, which takes part in the sum all the same
        value = own[0].to(accumulation_dtype(*(x for x in own if x.is_floating_point()))).sum()
    shares = [Partial() if place.is_shard() else Replicate() for place in placements]
    total = DTensor.from_local(value, mesh, shares, run_check=False)
    replicated: Tensor = total.redistribute(placements=[Replicate()] * mesh.ndim)
    return replicated
