"""Exact attention at a sample of positions, at any size. A benchmark prints no time for a result that fails this check.

The reference is computed in fp64 for sampled queries (their whole windows), sampled keys (every query that sees them,
with those queries' whole windows) and whole heads where a gradient sums over all queries (registers, sink). A second
pass of the same formula rounds where a flash kernel of the input's precision has to: the weights before they are
multiplied with the values, the score gradients, and the results; with inputs in fp32 it is the formula in fp32. The
error of a tested result may be at most twice that of the second pass, in fp32 eight times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from natten_layers.geometry import class_length, query_bounds, window_bounds

from .workloads import Inputs, Mode, Workload

__all__ = ["Errors", "Reference"]

ERROR_FACTOR = 2.0
FP32_FACTOR = 8.0  # a GPU's exponential is off by two units in the last place; TF32 products would be by a thousand
QUERY_SAMPLES, KEY_SAMPLES, SINK_SAMPLES = 48, 8, 8
BAND_PAIRS = 2**25  # most query-key pairs computed at a time: 256 MiB of fp64 scores
KEY_PAIRS = 2**34  # most query-key pairs to compute for all sampled keys together

Bounds = Callable[[Tensor, int, int, int, bool], tuple[Tensor, Tensor]]
Box = tuple[tuple[int, int], ...]  # first and last position (inclusive) on each axis
Errors = dict[str, tuple[float, float]]
"""Relative error and the error allowed, by name of the result."""


@dataclass
class Sample:
    """One exact vector (or number), and the same computed in the input's precision."""

    at: tuple[int, ...]  # index into the result
    exact: Tensor
    rounded: Tensor


@dataclass
class Rows:
    """Attention and its backward for the queries of one box and one head."""

    out: Tensor  # [n, D]
    d_query: Tensor  # [n, D]
    d_key: Tensor  # [c, D], the part of the requested columns' gradient that comes from this box
    d_value: Tensor  # [c, D]
    d_sink: Tensor  # []


class Grid(NamedTuple):
    """The tokens of one residue class of a dilated window; positions are indices within the class."""

    batch: int
    residue: tuple[int, ...]
    lengths: tuple[int, ...]


class Reference:
    """Exact samples of one problem, computed once and compared with any number of implementations."""

    def __init__(self, workload: Workload, inputs: Inputs, mode: Mode, seed: int = 0) -> None:
        self.workload, self.inputs, self.window = workload, inputs, workload.window
        self._generator = torch.Generator().manual_seed(seed)
        self._samples: dict[str, list[Sample]] = {}
        self._sample_queries(mode)
        if mode == "fwdbwd":
            self._sample_keys()
            self._sample_sums()

    def errors(self, results: dict[str, Tensor]) -> Errors:
        """Compare ``results``, named ``out``, ``d_query``, ``d_key``, ``d_value``, ``d_additional_keys``,
        ``d_additional_values`` or ``d_sink``, in the layouts of :class:`Inputs`.

        Raises:
            KeyError: there is no reference for a result.
        """
        errors = {}
        for name in results:
            samples = self._samples[name]
            got = torch.stack([results[name][s.at].double() for s in samples])
            exact, rounded = (torch.stack(list(t)) for t in zip(*((s.exact, s.rounded) for s in samples), strict=True))
            norm = exact.norm()
            error, twin = ((t - exact).norm() / norm for t in (got, rounded))
            factor = FP32_FACTOR if self.inputs.query.dtype == torch.float32 else ERROR_FACTOR
            errors[name] = (error.item(), factor * twin.item())
        return errors

    def _positions(self, count: int) -> list[tuple[int, ...]]:
        """Both corners, then random positions."""
        spatial = self.workload.spatial
        corners = [(0,) * len(spatial), tuple(length - 1 for length in spatial)]
        return [*corners, *(tuple(self._random(length) for length in spatial) for _ in range(count - 2))]

    def _random(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def _sample_queries(self, mode: Mode) -> None:
        names = ("out",) if mode == "fwd" else ("out", "d_query")
        for position in self._positions(QUERY_SAMPLES):
            at = (self._random(self.workload.batch), *position, self._random(self.workload.heads))
            grid, index = self._grid(at[0], position)
            box = tuple((i, i) for i in index)
            exact, rounded = (self._rows(grid, at[-1], box, None, rounding) for rounding in (False, True))
            for name in names:
                sample = Sample(at, getattr(exact, name)[0], getattr(rounded, name)[0])
                self._samples.setdefault(name, []).append(sample)

    def _sample_keys(self) -> None:
        w = self.workload
        cost = (
            w.heads
            // w.kv_heads
            * math.prod(k * min(2 * k, length) for k, length in zip(w.kernel_size, w.spatial, strict=True))
        )
        for position in self._positions(max(2, min(KEY_SAMPLES, KEY_PAIRS // cost))):
            batch, kv_head = self._random(w.batch), self._random(w.kv_heads)
            grid, index = self._grid(batch, position)
            box = self._bounds(query_bounds, tuple((i, i) for i in index), grid.lengths)
            exact, rounded = (self._key_gradients([(grid, box)], kv_head, index, r) for r in (False, True))
            for name, e, r in zip(("d_key", "d_value"), exact, rounded, strict=True):
                self._samples.setdefault(name, []).append(Sample((batch, *position, kv_head), e[0], r[0]))

    def _sample_sums(self) -> None:
        """Gradients to which every query of a head contributes."""
        w, inputs = self.workload, self.inputs
        if inputs.additional_keys is not None:
            batch, kv_head = self._random(w.batch), self._random(w.kv_heads)
            exact, rounded = (self._key_gradients(self._everything(batch), kv_head, (), r) for r in (False, True))
            for name, e, r in zip(("d_additional_keys", "d_additional_values"), exact, rounded, strict=True):
                self._samples[name] = [Sample((batch, i, kv_head), e[i], r[i]) for i in range(len(e))]
        if isinstance(inputs.sink, Tensor):
            parts = [part for batch in range(w.batch) for part in self._everything(batch)]
            bands = [(grid, band) for grid, box in parts for band in self._bands(grid, box)]
            heads = torch.randperm(w.heads, generator=self._generator)[:SINK_SAMPLES].tolist()
            self._samples["d_sink"] = []
            for head in heads:
                exact, rounded = (
                    torch.stack([self._rows(grid, head, band, None, r).d_sink for grid, band in bands]).sum()
                    for r in (False, True)
                )
                self._samples["d_sink"].append(Sample((head,), exact, rounded))

    def _grid(self, batch: int, position: tuple[int, ...]) -> tuple[Grid, tuple[int, ...]]:
        """The residue class of a token, and the token's index in it."""
        residue, index = zip(
            *((p % d, p // d) for p, d in zip(position, self.window.dilation, strict=True)), strict=True
        )
        axes = zip(self.workload.spatial, self.window.dilation, residue, strict=True)
        return Grid(batch, residue, tuple(class_length(*axis) for axis in axes)), index

    def _everything(self, batch: int) -> list[tuple[Grid, Box]]:
        """All tokens of an image, class by class."""
        residues = itertools.product(*map(range, self.window.dilation))
        grids = [self._grid(batch, residue)[0] for residue in residues]
        return [(grid, tuple((0, length - 1) for length in grid.lengths)) for grid in grids]

    def _key_gradients(
        self, boxes: Sequence[tuple[Grid, Box]], kv_head: int, columns: tuple[int, ...], rounding: bool
    ) -> tuple[Tensor, Tensor]:
        group = self.workload.heads // self.workload.kv_heads
        heads = range(kv_head * group, (kv_head + 1) * group)
        bands = [(grid, band) for grid, box in boxes for band in self._bands(grid, box)]
        rows = [self._rows(grid, head, band, columns, rounding) for head in heads for grid, band in bands]
        if not rows:  # with a causal stride there are keys that no query sees
            d_key, d_value = (x.new_zeros(1, x.shape[-1]).double() for x in (self.inputs.key, self.inputs.value))
            return d_key, d_value
        d_key, d_value = (
            torch.stack(parts).sum(0) for parts in zip(*((r.d_key, r.d_value) for r in rows), strict=True)
        )
        return self._round(d_key, rounding), self._round(d_value, rounding)

    def _round(self, tensor: Tensor, rounding: bool) -> Tensor:
        return tensor.to(self.inputs.query.dtype).to(tensor.dtype) if rounding else tensor

    def _bands(self, grid: Grid, box: Box) -> Iterator[Box]:
        """Cut a box of queries along its first axis so that no piece has many more pairs than ``BAND_PAIRS``."""
        (first, last), *rest = box
        keys = self._bounds(window_bounds, box, grid.lengths)
        # A piece that is thin along the first axis sees about one window of keys there.
        per_row = math.prod(b - a + 1 for a, b in (*rest, *keys[1:])) * self.window.kernel_size[0]
        rows = max(1, min(BAND_PAIRS // per_row, 2 * self.window.kernel_size[0]))
        for start in range(first, last + 1, rows):
            yield ((start, min(start + rows - 1, last)), *rest)

    def _axes(self, lengths: Sequence[int]) -> Iterator[tuple[int, int, int, bool]]:
        """For each axis: its length, kernel size, stride and whether it is causal."""
        return zip(lengths, self.window.kernel_size, self.window.stride, self.window.is_causal, strict=True)

    def _bounds(self, bounds: Bounds, box: Box, lengths: Sequence[int]) -> Box:
        """The smallest box that contains what ``bounds`` (of windows or their inverse) returns for every position."""
        result = []
        for (a, b), axis in zip(box, self._axes(lengths), strict=True):
            first, last = bounds(torch.arange(a, b + 1), *axis)
            result.append((int(first.min()), int(last.max())))
        return tuple(result)

    def _mask(self, box: Box, keys: Box, lengths: Sequence[int], device: torch.device) -> Tensor:
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        for (a, b), (c, d), axis in zip(box, keys, self._axes(lengths), strict=True):
            query, key = torch.arange(a, b + 1, device=device), torch.arange(c, d + 1, device=device)
            first, last = window_bounds(query, *axis)
            visible = (key >= first[:, None]) & (key <= last[:, None])
            mask = (mask[:, None, :, None] & visible[None, :, None, :]).reshape(mask.shape[0] * visible.shape[0], -1)
        return mask

    def _rows(self, grid: Grid, head: int, box: Box, columns: tuple[int, ...] | None, rounding: bool) -> Rows:
        """Attention and its backward for one head and the queries of one box.

        ``columns`` selects the keys whose gradients are computed: a key's position, () for the registers, or None.
        """
        w, inputs = self.workload, self.inputs
        kv_head = head * w.kv_heads // w.heads
        # A kernel in fp32 rounds every sum, as the formula evaluated in fp32 does.
        dtype = torch.float32 if rounding and inputs.query.dtype == torch.float32 else torch.float64
        keys = self._bounds(window_bounds, box, grid.lengths)
        q, do = (self._take(t, grid, box, head).to(dtype) for t in (inputs.query, inputs.grad_out))
        k, v = (self._take(t, grid, keys, kv_head).to(dtype) for t in (inputs.key, inputs.value))
        mask = self._mask(box, keys, grid.lengths, q.device)
        registers = 0
        if inputs.additional_keys is not None and inputs.additional_values is not None:
            registers = inputs.additional_keys.shape[1]
            k = torch.cat([inputs.additional_keys[grid.batch, :, kv_head].to(dtype), k])
            v = torch.cat([inputs.additional_values[grid.batch, :, kv_head].to(dtype), v])
            mask = torch.cat([mask.new_ones(mask.shape[0], registers), mask], 1)

        scores = (w.scale * q @ k.T).masked_fill_(~mask, -math.inf)
        row_max = scores.amax(-1, keepdim=True)
        weights = scores.sub_(row_max).exp_()
        row_sum = weights.sum(-1, keepdim=True)
        sink_weight = torch.zeros_like(row_sum)
        if inputs.sink is not None:
            logit = inputs.sink[head].to(dtype) if isinstance(inputs.sink, Tensor) else inputs.sink
            sink_weight = torch.exp(logit - row_max)
        row_sum = row_sum + sink_weight
        out = self._round(self._round(weights, rounding) @ v / row_sum, rounding)

        delta = (do * out).sum(-1, keepdim=True)
        weights /= row_sum
        d_scores = self._round(weights * (do @ v.T - delta), rounding)
        picked = slice(0, 0)
        if columns is not None:
            column = _ravel(columns, keys) + registers if columns else 0
            picked = slice(column, column + 1) if columns else slice(0, registers)
        return Rows(
            out=out,
            d_query=self._round(w.scale * d_scores @ k, rounding),
            d_key=w.scale * d_scores[:, picked].T @ q,
            d_value=self._round(weights[:, picked], rounding).T @ do,
            d_sink=-(sink_weight / row_sum * delta).sum(),
        )

    def _take(self, tensor: Tensor, grid: Grid, box: Box, head: int) -> Tensor:
        """The box's tokens of ``[B, *spatial, H, D]`` as ``[tokens, D]``."""
        axes = zip(grid.residue, self.window.dilation, box, strict=True)
        tokens = tuple(slice(r + d * first, r + d * last + 1, d) for r, d, (first, last) in axes)
        return tensor[(grid.batch, *tokens, ..., head, slice(None))].flatten(0, -2)


def _ravel(position: Sequence[int], box: Box) -> int:
    index = 0
    for p, (first, last) in zip(position, box, strict=True):
        index = index * (last - first + 1) + p - first
    return index
