"""Blocked attention in PyTorch: tiles of queries that attend to the union of their windows; ``eager.py`` uses it.

A tile takes a gather, a matrix product with a small mask, a softmax and a matrix product; any number of axes, strides,
dilations and causal axes are the same loop over tiles.

Shapes are those of ``tiles.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .kernels.ops.define import Mapped, in_one_batch, known_tangents, save_for_jvp
from .kernels.ops.transforms import is_forward_mode, is_vectorized
from .position_bias import look_up, sum_up
from .tiles import Axis, Block

__all__ = ["State", "attend_tiles", "nonfinite_mask"]

State = tuple[Tensor, Tensor, Tensor]
"""``out``, ``row_max``, and ``row_sum`` or its logarithm."""

CHUNK_SCORES = 1 << 19
"""Scores that are computed at once, so few that they stay in a core's cache between the two matrix products."""

Chunk = tuple[Block, ...]
Part = tuple[int, int]  # start and length along Z


def nonfinite_mask(x: Tensor) -> Tensor:
    """``[..., 1]``: 1.0 where some element of the last axis is nonfinite, else 0.0.

    ``x - x`` is zero for finite numbers and NaN for others, and cheaper than ``isfinite``.
    """
    x = x.detach()
    return ((x - x).sum(-1, keepdim=True) != 0).to(x.dtype)


def _box(x: Tensor, chunk: Chunk) -> Tensor:
    """The part of ``x [Z, *spatial, D]`` that the chunk's tiles see."""
    for i, block in enumerate(chunk):
        x = x.narrow(1 + i, block.origin, block.width)
    return x


def _gather(x: Tensor, chunk: Chunk) -> Tensor:
    """Gather the unions of the chunk's tiles, ``[Z, tiles, U, D]``, from ``[Z, *spatial, D]``."""
    rank = len(chunk)
    x = _box(x, chunk)
    for i, block in enumerate(chunk):  # [Z, *tiles so far, *keys so far, length, ..., D]
        keys = [block.view(x, tile, 1 + 2 * i) for tile in range(len(block.first))]
        x = torch.stack(keys, 1 + i) if len(keys) > 1 else keys[0].unsqueeze(1 + i)  # one tile needs no copy
    return x.flatten(1 + rank, 2 * rank).flatten(1, rank)


def _gather_part(x: Tensor | None, chunk: Chunk, part: Part) -> Tensor | None:
    return None if x is None else _gather(x.narrow(0, *part), chunk)


def _scatter_add(target: Tensor, grad: Tensor, chunk: Chunk) -> None:
    """Add ``grad [Z, tiles, U, D]`` to ``target [Z, *spatial, D]``: the adjoint of :func:`_gather`."""
    target = _box(target, chunk)
    grad = grad.unflatten(2, [b.keys for b in chunk]).unflatten(1, [len(b.first) for b in chunk])
    for i, block in reversed(list(enumerate(chunk))):  # [Z, *tiles to i, *keys to i, width of i + 1, ..., D]
        dim = 1 + 2 * i
        shape = (*grad.shape[: 1 + i], *grad.shape[2 + i : dim + 1], block.width, *grad.shape[dim + 2 :])
        total = target if i == 0 else grad.new_zeros(shape)
        for tile in range(len(block.first)):
            block.view(total, tile, dim).add_(grad.select(1 + i, tile))
        grad = total


def _chunks(tiles: Tensor, axes: tuple[Axis, ...]) -> tuple[list[int], Iterator[tuple[Chunk, Part, Tensor]]]:
    """Cut the tiles into chunks of about ``CHUNK_SCORES`` scores, but of at least one tile and one index of Z.

    Returns the number of chunks along every axis and along Z, and an iterator over chunks, each with its part of Z,
    which varies fastest, and its mask ``[tiles, T, U]`` of 0 and -inf.
    """
    z = tiles.shape[0]
    scores = math.prod(tiles.shape[-3:-1]) * math.prod([a.union_keys(a.tile + a.stride - 1) for a in axes])
    # A compiled graph must not depend on the batch, which may be symbolic.
    compiling = torch.compiler.is_compiling()
    steps = [a.tiles for a in axes]
    while (1 if compiling else z) * scores * math.prod(steps) > CHUNK_SCORES and max(steps) > 1:
        i = next(i for i, step in enumerate(steps) if step > 1)
        steps[i] = -(-steps[i] // 2)
    z_step = max(1, CHUNK_SCORES // (scores * math.prod(steps)))
    blocks = [
        [a.block(start, min(start + step, a.tiles)) for start in range(0, a.tiles, step)]
        for a, step in zip(axes, steps, strict=True)
    ]
    z_parts = [(0, z)] if compiling or z == 0 else [(start, min(z_step, z - start)) for start in range(0, z, z_step)]
    counts = [*map(len, blocks), len(z_parts)]
    return counts, _iterate(blocks, z_parts, tiles)


def _iterate(blocks: list[list[Block]], z_parts: list[Part], like: Tensor) -> Iterator[tuple[Chunk, Part, Tensor]]:
    # Masks of one axis are small beside the tensors unless there is no other axis, so those of the first are not kept.
    inner = [[(block, block.bias(like)) for block in axis] for axis in blocks[1:]]
    for outer in blocks[0]:
        outer_bias = outer.bias(like)
        for rest in itertools.product(*inner):
            bias = _combine([outer_bias, *(b for _, b in rest)])
            for part in z_parts:
                yield (outer, *(block for block, _ in rest)), part, bias


def _select(tiles: Tensor, chunk: Chunk, part: Part) -> Tensor:
    """Rows ``[Z, tiles, G * T, ...]`` of a chunk of ``[Z, *m, G, T, ...]``."""
    rank = len(chunk)
    x = tiles.narrow(0, *part)
    for i, block in enumerate(chunk):
        x = x.narrow(1 + i, block.start, len(block.first))
    return x.flatten(1 + rank, 2 + rank).flatten(1, rank)


def _unselect(x: Tensor, chunk: Chunk, like: Tensor) -> Tensor:
    """The inverse of :func:`_select`: ``[Z, tiles, G * T, ...]`` to ``[Z, *m, G, T, ...]``, G and T as in ``like``."""
    return x.unflatten(2, like.shape[-3:-1]).unflatten(1, [len(b.first) for b in chunk])


def _assemble(parts: list[Tensor], counts: Sequence[int]) -> Tensor:
    """Concatenate the results ``[Z, *m, ...]`` of all chunks."""
    for dim, count in zip((0, *range(len(counts) - 1, 0, -1)), reversed(counts), strict=True):
        parts = [torch.cat(parts[i : i + count], dim) for i in range(0, len(parts), count)]
    return parts[0]


def _combine(biases: list[Tensor]) -> Tensor:
    """Combine the masks ``[tiles, T, U]`` of all axes into one: 0 where a query sees a key on every axis, else -inf."""
    rank = len(biases)
    total = biases[0].new_zeros(())
    for i, bias in enumerate(biases):
        shape = [1] * (3 * rank)
        shape[i], shape[rank + i], shape[2 * rank + i] = bias.shape
        total = total + bias.reshape(shape)
    return total.flatten(2 * rank).flatten(rank, 2 * rank - 1).flatten(0, rank - 1)


def _weights(
    q: Tensor, k: Tensor, bias: Tensor, relative: Tensor | None, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row maximum ``[Z, tiles, G * T]`` and softmax ``[Z, tiles, G * T, U]`` of the scores of one chunk.

    ``hidden [Z, tiles, U, 1]`` is 0 or, for keys that are masked, -inf; entries of ``relative`` may be -inf too. A row
    that sees no key has weights of zero.
    """
    scores = q @ k.mT
    rows = scores.unflatten(2, (-1, bias.shape[1]))
    # Graphs that `torch.func.linearize` traces keep scores of parameters as leaves, which nothing may change in place.
    scores = (rows + bias[:, None] if is_forward_mode() else rows.add_(bias[:, None])).flatten(2, 3)
    if relative is not None:
        scores = scores + relative
    if hidden is None and relative is None:
        return scores.amax(-1), scores.softmax(-1)
    if hidden is not None:
        scores = scores + hidden.mT
    row_max = scores.amax(-1)
    sees_nothing = (row_max == -math.inf)[..., None]
    return row_max, scores.masked_fill(sees_nothing, 0.0).softmax(-1).masked_fill(sees_nothing, 0.0)


def _relative(table: Tensor, chunk: Chunk, part: Part, group: int) -> tuple[list[Tensor], Tensor, int]:
    """Arguments of :func:`look_up` and :func:`sum_up` after the tensor."""
    start, length = part
    heads = torch.arange(start, start + length, device=table.device) % (table.shape[0] // group)
    return [block.entries(table.device) for block in chunk], heads, group


def _look_up(table: Tensor | None, chunk: Chunk, part: Part, group: int) -> Tensor | None:
    return None if table is None else look_up(table, *_relative(table, chunk, part, group))


def _nonfinite_rows(nonfinite: Tensor, chunk: Chunk, part: Part, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to outputs ``[Z, *m, 1, T, 1]``, and to log-sum-exps ``[Z, *m, 1, T]``: NaN or 0.

    It is NaN where a row sees a nonfinite key or, for outputs, a nonfinite value.
    """
    seen = (bias + 1).relu()  # 1 or 0
    counts = torch.einsum("mtu,zmuc->zmtc", seen, _gather(nonfinite.narrow(0, *part), chunk)).cumsum(-1)
    rows = torch.where(counts > 0, math.nan, 0.0).unflatten(1, [len(b.first) for b in chunk]).unsqueeze(-3)
    return rows[..., 1:], rows[..., 0]


def _refuse_vectorized() -> None:
    if is_vectorized():
        raise NotImplementedError(
            "torch.autograd cannot vectorize derivatives of attention in PyTorch (is_grads_batched=True, "
            "vectorize=True); use torch.func.jacrev, jacfwd or vmap"
        )


class _Tiles(torch.autograd.Function):
    """Attention of every tile over the union of its windows. Weights are recomputed in the backward pass.

    ``(query [Z, *m, G, T, D], key [Z, *spatial, D], value [Z, *spatial, Dv], table, nonfinite [Z, *spatial, 2],
    hidden [Z, *spatial, 1], axes)`` to ``(out [Z, *m, G, T, Dv], row_max [Z, *m, G, T], log(row_sum))``. ``row_max`` is
    a constant to autograd. ``table`` is that of ``position_bias.py``, or None. ``nonfinite`` is 1 where a key or a
    value was nonfinite, and None if all are finite. Rows that see such a key become NaN, their gradients do not.
    ``hidden`` is -inf where a key is masked, else 0, and None if none is. Rows that see no key have gradients of zero.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        table: Tensor | None,
        nonfinite: Tensor | None,
        hidden: Tensor | None,
        axes: tuple[Axis, ...],
    ) -> State:
        parts: list[tuple[Tensor, ...]] = []
        counts, chunks = _chunks(query, axes)
        for chunk, z, bias in chunks:
            relative = _look_up(table, chunk, z, query.shape[-3])
            row_max, p = _weights(
                _select(query, chunk, z),
                _gather(key.narrow(0, *z), chunk),
                bias,
                relative,
                _gather_part(hidden, chunk, z),
            )
            # The largest weight is exp(0) / row_sum, so a maximum over weights gives the sum.
            log_sum = -p.amax(-1).log()
            if hidden is not None or table is not None:
                log_sum = log_sum.masked_fill(row_max == -math.inf, -math.inf)
            out = p @ _gather(value.narrow(0, *z), chunk)
            out, row_max, log_sum = (_unselect(x, chunk, query) for x in (out, row_max, log_sum))
            if nonfinite is not None:
                of_out, of_sum = _nonfinite_rows(nonfinite, chunk, z, bias)
                out, log_sum = out + of_out, log_sum + of_sum
            parts.append((out, row_max, log_sum))
        out, row_max, log_sum = (_assemble(list(p), counts) for p in zip(*parts, strict=True))
        return out, row_max, log_sum

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
        query, key, value, table, _, hidden, ctx.axes = inputs
        ctx.save_for_backward(query, key, value, table, hidden)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_vectorized()
        query, key, value, table, hidden = ctx.saved_tensors
        grad_out, _, grad_lse = grads
        parts: list[Tensor] = []
        grad_key = grad_value = grad_table = None
        counts, chunks = _chunks(query, ctx.axes)
        for chunk, z, bias in chunks:
            q, k = _select(query, chunk, z), _gather(key.narrow(0, *z), chunk)
            relative = _look_up(table, chunk, z, query.shape[-3])
            row_max, p = _weights(q, k, bias, relative, _gather_part(hidden, chunk, z))
            do, dlse = _select(grad_out, chunk, z), _select(grad_lse, chunk, z)
            if hidden is not None or table is not None:
                # A cotangent of log(0) may be NaN. What depends on a row that sees no key is constant.
                sees_nothing = row_max == -math.inf
                do, dlse = do.masked_fill(sees_nothing[..., None], 0.0), dlse.masked_fill(sees_nothing, 0.0)
            weighted = p * (do @ _gather(value.narrow(0, *z), chunk).mT)
            # dS = P (dP - delta), delta = rowsum(P dP) - dlse
            ds = weighted - p * (weighted.sum(-1) - dlse)[..., None]
            parts.append(_unselect(ds @ k, chunk, query))
            dk, dv = ds.mT @ q, p.mT @ do
            if grad_key is None or grad_value is None:
                grad_key, grad_value = dk.new_zeros(key.shape), dv.new_zeros(value.shape)
            _scatter_add(grad_key.narrow(0, *z), dk, chunk)
            _scatter_add(grad_value.narrow(0, *z), dv, chunk)
            if table is not None:
                dt = sum_up(ds, *_relative(table, chunk, z, query.shape[-3]), table)
                grad_table = dt if grad_table is None else grad_table + dt
        return _assemble(parts, counts), grad_key, grad_value, grad_table, None, None, None


class _ForwardModeTiles(_Tiles):
    """:class:`_Tiles` with rules for vmap and forward mode, which ``torch.compile`` refuses to trace."""

    generate_vmap_rule = False

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
        _Tiles.setup_context(ctx, inputs, output)
        save_for_jvp(ctx, *inputs[:-1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None, Tensor]:
        _refuse_vectorized()
        # Torch switches forward mode off here, so an outer level of it would silently take tangents for constants.
        with forward_ad._set_fwd_grad_enabled(True):
            return _tangents(ctx.axes, *(_primal(x) for x in ctx.saved_tensors), *tangents[:4])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Mapped:
        table = 3  # of which all heads of a batch share one
        return in_one_batch(_ForwardModeTiles.apply, (table,), info, in_dims, args)


def _primal(x: Any) -> Any:
    """A saved tensor, or None, without its tangent of the level whose tangents are computed."""
    return None if x is None else forward_ad.unpack_dual(x).primal


def _tangents(
    axes: tuple[Axis, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    nonfinite: Tensor | None,
    hidden: Tensor | None,
    *tangents: Tensor | None,
) -> tuple[Tensor, None, Tensor]:
    """Tangents of the results of :class:`_Tiles`, from those of query, key, value and table.

    Rows that see a nonfinite key or value, or a nonfinite tangent of one, become NaN.
    """
    known = known_tangents(("query", "key", "value"), (query, key, value), tangents)
    q_dot, k_dot, v_dot = (
        torch.zeros_like(x) if t is None else t for x, t in zip((query, key, value), known, strict=True)
    )
    nonfinite_dots = torch.cat([nonfinite_mask(k_dot), nonfinite_mask(v_dot)], -1)
    nonfinite = nonfinite_dots if nonfinite is None else nonfinite + nonfinite_dots
    k_dot, v_dot = (t.nan_to_num(0.0, 0.0, 0.0) for t in (k_dot, v_dot))
    group = query.shape[-3]
    parts: list[tuple[Tensor, Tensor]] = []
    counts, chunks = _chunks(query, axes)
    for chunk, z, bias in chunks:
        q, k = _select(query, chunk, z), _gather(key.narrow(0, *z), chunk)
        _, p = _weights(q, k, bias, _look_up(table, chunk, z, group), _gather_part(hidden, chunk, z))
        s_dot = _select(q_dot, chunk, z) @ k.mT + q @ _gather(k_dot.narrow(0, *z), chunk).mT
        if tangents[3] is not None:
            s_dot = s_dot + look_up(tangents[3], *_relative(tangents[3], chunk, z, group))
        weighted = p * s_dot
        mean = weighted.sum(-1)
        out_dot = (weighted - p * mean[..., None]) @ _gather(value.narrow(0, *z), chunk) + p @ _gather(
            v_dot.narrow(0, *z), chunk
        )
        of_out, of_sum = _nonfinite_rows(nonfinite, chunk, z, bias)
        parts.append((_unselect(out_dot, chunk, query) + of_out, _unselect(mean, chunk, query) + of_sum))
    out_dot, lse_dot = (_assemble(list(p), counts) for p in zip(*parts, strict=True))
    return out_dot, None, lse_dot


def attend_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor | None,
    nonfinite: Tensor | None,
    hidden: Tensor | None,
    axes: tuple[Axis, ...],
) -> State:
    """Apply :class:`_Tiles`; it is differentiable in forward mode too, except in compiled graphs."""
    function = _Tiles if torch.compiler.is_compiling() else _ForwardModeTiles
    return function.apply(query, key, value, table, nonfinite, hidden, axes)
