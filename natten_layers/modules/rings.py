"""Checks of rotary embeddings beside periodic axes, where rotations must come back to the same place as windows do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..geometry import AXES, normalise_axes
from ..kernels.ops.define import is_watched
from .axial_rope import AxialRoPE, axial_bounds
from .rope import RoPE

__all__ = ["check_packed_ring_positions", "check_ring_positions", "check_rings"]

Flags = bool | tuple[bool, ...]


def check_rings(rope: nn.Module | None, is_periodic: Flags, rank: int) -> None:
    """Raise a ValueError if ``rope`` takes a periodic one among ``rank`` axes for a line.

    A rope with another number of coordinates than there are axes is not judged, as points on a sphere have three. Nor
    is one of another class than this library's.
    """
    rings = _rings(rope, is_periodic, rank)
    if rings and isinstance(rope, RoPE):
        raise ValueError(
            f"rope is a RoPE, which counts tokens along a line, but is_periodic={is_periodic} makes the axis a ring; "
            "take AxialRoPE(head_dim, heads, axes=1, periods=(length,)), with the axis' length in units of positions"
        )
    for axis in rings:
        assert isinstance(rope, AxialRoPE)
        if not rope.periods or rope.periods[axis] is None:
            example = ", ".join("length" if i in rings else "None" for i in range(rank)) + ("," if rank == 1 else "")
            raise ValueError(
                f"rope is an AxialRoPE without a period on the {AXES[rank][axis]} axis, which "
                f"is_periodic={is_periodic} makes a ring: its ends are neighbors for windows, but far apart for rope. "
                f"Make AxialRoPE(..., periods=({example})), with the axis' length in units of positions, or math.inf "
                "as the length to leave frequencies as they are"
            )


def check_ring_positions(rope: nn.Module | None, is_periodic: Flags, query: Tensor, positions: Tensor | None) -> None:
    """Raise a ValueError if a periodic axis of ``query [B, *spatial, H, D]`` is not as long as the period of ``rope``.

    ``positions`` are those that ``rope`` has accepted. They are read on a CPU only: elsewhere that would wait for the
    device.
    """
    spatial = query.shape[1:-2]
    check_rings(rope, is_periodic, len(spatial))
    for axis in _rings(rope, is_periodic, len(spatial)):
        assert isinstance(rope, AxialRoPE)
        period = rope.periods[axis]
        assert period is not None
        if math.isinf(period):
            continue
        name = f"the {AXES[len(spatial)][axis]} axis, which is_periodic={is_periodic} makes a ring"
        if positions is None:
            length = 2 * axial_bounds(*spatial)[axis]
            if abs(length - period) > 1e-6 * period:
                raise ValueError(
                    f"rope has periods={rope.periods}, but {name}, is {length} long in the positions that an image of "
                    f"{tuple(spatial)} has by default; make AxialRoPE with that period, or give positions in its units"
                )
        elif positions.device.type == "cpu" and not is_watched((positions,)):
            _check_turn(rope, positions[..., axis].movedim(axis - len(spatial), -1), period, name)


def check_packed_ring_positions(rope: nn.Module | None, is_periodic: Flags, sizes: Tensor, positions: Tensor) -> None:
    """Raise a ValueError if a periodic axis of a packed sample is not as long as the period of ``rope``.

    Args:
        sizes: ``[samples, rank]``, the samples' shapes, in the host's memory.
        positions: ``[N, axes]`` or ``[1, N, axes]``, as ``rope`` has accepted them, of as many tokens as samples have.
    """
    if positions.device.type != "cpu" or is_watched((positions,)):
        return
    rank = sizes.shape[1]
    for axis in _rings(rope, is_periodic, rank):
        assert isinstance(rope, AxialRoPE)
        period = rope.periods[axis]
        assert period is not None
        if math.isinf(period):
            continue
        samples = positions.reshape(-1, rank)[:, axis].split(sizes.prod(1).tolist())
        for i, (sample, shape) in enumerate(zip(samples, sizes.tolist(), strict=True)):
            name = (
                f"the {AXES[rank][axis]} axis of sample {i} with the shape {tuple(shape)}, which "
                f"is_periodic={is_periodic} makes a ring"
            )
            _check_turn(rope, sample.reshape(shape).movedim(axis, -1), period, name)


def _rings(rope: nn.Module | None, is_periodic: Flags, rank: int) -> list[int]:
    """The periodic axes that are coordinates of ``rope``."""
    if is_periodic is False or type(rope) not in (AxialRoPE, RoPE):
        return []
    if isinstance(rope, AxialRoPE) and rope.axes != rank:
        return []
    return [axis for axis, flag in enumerate(normalise_axes("is_periodic", is_periodic, rank, bool)) if flag]


def _check_turn(rope: AxialRoPE, places: Tensor, period: float, name: str) -> None:
    """Raise unless ``places [..., n]`` go around the ring once, in steps that are alike."""
    if places.shape[-1] < 3 or places.numel() == 0:  # two places are as far apart one way as the other
        return
    places = places.detach().double()
    steps = places.roll(-1, -1) - places
    steps = steps - period * (steps / period).round()  # the shorter way
    once = (steps.sum(-1) / period).round().abs() == 1
    least, most = steps[..., :-1].abs().aminmax(dim=-1)
    slack = most - least + most / 100  # where steps are equal, the last one differs from them by rounding only
    last = steps[..., -1].abs()
    wrong = places[~(once & (last > torch.maximum(least - slack, least / 2)) & (last < most + slack))]
    if len(wrong):
        first = wrong[0].tolist()
        raise ValueError(
            f"rope has periods={rope.periods}, but positions on {name}, are {first[0]:g}, {first[1]:g}, ..., "
            f"{first[-1]:g}: they must go around once in steps that are alike, that from the last token to the first "
            f"among them, so the period of {len(first)} tokens is {len(first)} steps"
        )
