"""Biases on relative positions: a table's entries as a bias of scores, and the table's gradient from the scores'.

Old NATTEN's tables: ``[Hq, 2 k_1 - 1, ..., 2 k_r - 1]``; the entry of a query and a key on an axis of kernel size ``k``
is their distance in keys of a window, plus ``k - 1``. Shape legend as in ``tiles.py``; m, T and U are an axis's own
where they carry its number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["look_up", "sum_up"]

TILES, QUERIES, KEYS = "abc", "def", "ijk"
"""Letters of the axes' m, T and U"""


def look_up(table: Tensor, entries: Sequence[Tensor], heads: Tensor, group: int) -> Tensor:
    """The bias of the scores ``[Z, tiles, G * T, U]``.

    Args:
        entries: of every axis, ``[m_i, T_i, U_i]``.
        heads: KV head of every Z.
    """
    rank = len(entries)
    spread = [
        e.reshape([n if axis == i else 1 for n in e.shape for axis in range(rank)]) for i, e in enumerate(entries)
    ]
    bias = table[:, *spread]  # [Hq, *m, *T, *U]
    bias = bias.flatten(1 + 2 * rank).flatten(1 + rank, 2 * rank).flatten(1, rank)
    return bias.unflatten(0, (-1, group)).movedim(1, 2).flatten(2, 3).index_select(0, heads)


def sum_up(grad: Tensor, entries: Sequence[Tensor], heads: Tensor, group: int, table: Tensor) -> Tensor:
    """The adjoint of :func:`look_up` for scores' gradients: the gradient of ``table``.

    By products with matrices of zeros and ones, not by scattering, as the order in which a device adds to one place may
    differ from run to run.
    """
    rank = len(entries)
    m, t, u = ([e.shape[i] for e in entries] for i in range(3))
    grad = grad.unflatten(3, u).unflatten(2, (group, *t)).unflatten(1, m)
    letters = f"z{TILES[:rank]}g{QUERIES[:rank]}{KEYS[:rank]}"
    grad = torch.einsum(f"{letters},zh->h{letters[1:]}", grad, _one_hot(heads, table.shape[0] // group, grad))
    letters = f"h{letters[1:]}"
    for i, entry in enumerate(entries):
        axis = TILES[i] + QUERIES[i] + KEYS[i]
        rest = "".join(letter for letter in letters if letter not in axis)
        size = table.shape[1 + i]
        # The table's axes come last, in their order.
        grad = torch.einsum(f"{letters},{axis}{'xyw'[i]}->{rest}{'xyw'[i]}", grad, _one_hot(entry, size, grad))
        letters = rest + "xyw"[i]
    return grad.flatten(0, 1)


def _one_hot(index: Tensor, size: int, like: Tensor) -> Tensor:
    return (index[..., None] == torch.arange(size, device=index.device)).to(like.dtype)
