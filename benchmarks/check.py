"""Exact attention at a sample of positions, at any size. A benchmark prints no time for a result that fails this check.

The reference is computed in fp64 for sampled queries (their whole windows), sampled keys (every query that sees them,
with those queries' whole windows) and whole heads where a gradient sums over all queries (registers, sink, bias). A
second pass of the same formula rounds where a flash kernel of the input's precision has to: the weights before they are
multiplied with the values, the score gradients, and the results; with inputs in fp32 it is the formula in fp32. The
error of a tested result may be at most twice that of the second pass, in fp32 eight times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten_layers.geometry import class_length, query_bounds, window_bounds

from .workloads import Inputs, Mode, Workload

__all__ = ["Errors", "Reference", "wrong_result"]

ERROR_FACTOR = 2.0
FP32_FACTOR = 8.0  # a GPU's exponential is off by two units in the last place; TF32 products would be by a thousand
QUERY_SAMPLES, KEY_SAMPLES, SINK_SAMPLES, BIAS_SAMPLES = 48, 8, 8, 1
BAND_PAIRS = 2**25  # most query-key pairs computed at a time: 256 MiB of fp64 scores
KEY_PAIRS = 2**34  # most query-key pairs to compute for all sampled keys together

Bounds = Callable[..., tuple[Tensor, Tensor]]
Box = tuple[tuple[int, int], ...]  # first and last position (inclusive) on each axis
Errors = dict[str, tuple[float, float]]
"""Relative error and the error allowed, by name of the result."""


def wrong_result(error: float, allowed: float) -> str | None:
    """Why a result with this relative error gets no time, or None if so much is allowed. Without a limit none is."""
    if math.isfinite(allowed) and error <= allowed:
        return None
    return f"wrong result, relative error {error:.2g} > {allowed:.2g}"


@dataclass
class Sample:
    """One exact vector (or number), and the same computed in the input's precision.

    Errors of a sum over all queries have random signs, and may cancel where the input's precision is simulated. So the
    sum errs there by at least what errors of random signs do: the root of the sum of their squares.
    """

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
    d_sink: Tensor  # [n], each query's part
    d_rpb: Tensor | None  # [2 * kernel_size - 1 per axis], the part of the table's gradient that comes from this box


class Axis(NamedTuple):
    """One axis of a residue class, in the order in which functions of :mod:`natten_layers.geometry` take it."""

    length: int
    kernel_size: int
    stride: int
    is_causal: bool
    is_periodic: bool
    key_length: int | None

    @property
    def keys(self) -> int:
        return self.length if self.key_length is None else self.key_length


class Grid(NamedTuple):
    """The tokens of one residue class of a dilated window; positions are indices within the class.

    On a periodic axis positions are unwrapped, as in :mod:`natten_layers.geometry`.
    """

    image: int
    residue: tuple[int, ...]
    dilation: tuple[int, ...]
    axes: tuple[Axis, ...]

    @property
    def everything(self) -> Box:
        return tuple((0, axis.length - 1) for axis in self.axes)


def key_bounds(query: Tensor, length: int, *axis: Any) -> tuple[Tensor, Tensor]:
    """:func:`window_bounds` of queries that may be unwrapped."""
    keys = length if axis[-1] is None else axis[-1]
    turns = query.div(length, rounding_mode="floor")
    first, last = window_bounds(query - turns * length, length, *axis)
    return first + turns * keys, last + turns * keys


class Reference:
    """Exact samples of one problem, computed once and compared with any number of implementations."""

    def __init__(self, workload: Workload, inputs: Inputs, mode: Mode, seed: int = 0) -> None:
        self.workload, self.inputs, self.images = workload, inputs, workload.images
        self._generator = torch.Generator().manual_seed(seed)
        self._samples: dict[str, list[Sample]] = {}
        self._sample_queries(mode)
        if mode != "fwd":
            self._sample_keys()
            self._sample_sums()

    def errors(self, results: dict[str, Tensor]) -> Errors:
        """Compare ``results``, named ``out``, ``d_query``, ``d_key``, ``d_value``, ``d_additional_keys``,
        ``d_additional_values``, ``d_sink`` or ``d_rpb``, in the layouts of :class:`Inputs`.

        Raises:
            KeyError: there is no reference for a result.
        """
        errors = {}
        for name in results:
            samples = self._samples[name]
            got = torch.stack([self._result(name, results[name], s.at).double() for s in samples])
            exact, rounded = (torch.stack(list(t)) for t in zip(*((s.exact, s.rounded) for s in samples), strict=True))
            norm = exact.norm()
            error, twin = ((t - exact).norm() / norm for t in (got, rounded))
            factor = FP32_FACTOR if self.inputs.query.dtype == torch.float32 else ERROR_FACTOR
            errors[name] = (error.item(), factor * twin.item())
        return errors

    def _result(self, name: str, result: Tensor, at: tuple[int, ...]) -> Tensor:
        if name in ("d_sink", "d_rpb"):
            return result[at]
        image, *index = at
        return self._image(result, image)[tuple(index)]

    def _image(self, tensor: Tensor, image: int) -> Tensor:
        """``[*spatial, H, D]`` of an image, or ``[R, H, D]`` of its registers. Tokens of packed samples may come in
        the shape of any images that are as many tokens."""
        if not self.workload.shapes:
            return tensor[image]
        sizes = [math.prod(shape) for shape in self.workload.shapes]
        return tensor.flatten(0, -3).split(sizes)[image].unflatten(0, self.workload.shapes[image])

    def _positions(self, count: int, *, keys: bool = False) -> list[tuple[int, tuple[int, ...]]]:
        """Images and positions of queries or keys: corners of the first images, then random ones."""
        grids = [(image.key_spatial if keys else ()) or image.spatial for image in self.images]
        corners = [
            (image, tuple(end * (length - 1) for length in spatial))
            for image, spatial in enumerate(grids)
            for end in (0, 1)
        ]
        images = [self._random(len(grids)) for _ in range(count - min(len(corners), count // 2))]
        return [
            *corners[: count // 2],
            *((image, tuple(self._random(length) for length in grids[image])) for image in images),
        ]

    def _random(self, end: int) -> int:
        return int(torch.randint(end, (), generator=self._generator))

    def _sample_queries(self, mode: Mode) -> None:
        names = ("out",) if mode == "fwd" else ("out", "d_query")
        for image, position in self._positions(QUERY_SAMPLES):
            at = (image, *position, self._random(self.workload.heads))
            grid, index = self._grid(image, position)
            box = tuple((i, i) for i in index)
            exact, rounded = (self._rows(grid, at[-1], box, None, rounding) for rounding in (False, True))
            for name in names:
                sample = Sample(at, getattr(exact, name)[0], getattr(rounded, name)[0])
                self._samples.setdefault(name, []).append(sample)

    def _sample_keys(self) -> None:
        w = self.workload
        longest = w.spatial or tuple(max(axis) for axis in zip(*w.shapes, strict=True))
        axes = zip(w.kernel_size, longest, w.key_spatial or longest, strict=True)
        # As many queries see a key as a window has keys, times the queries for a key.
        pairs = math.prod(-(-k * queries // keys) * min(2 * k, keys) for k, queries, keys in axes)
        count = max(2, min(KEY_SAMPLES, KEY_PAIRS // (w.heads // w.kv_heads * pairs)))
        for image, position in self._positions(count, keys=True):
            kv_head = self._random(w.kv_heads)
            grid, index = self._grid(image, position)
            box = self._bounds(query_bounds, tuple((i, i) for i in index), grid)
            exact, rounded = (self._key_gradients([(grid, box)], kv_head, index, r) for r in (False, True))
            for name, e, r in zip(("d_key", "d_value"), exact, rounded, strict=True):
                self._samples.setdefault(name, []).append(Sample((image, *position, kv_head), e[0], r[0]))

    def _sample_sums(self) -> None:
        """Gradients to which every query of a head contributes."""
        w, inputs = self.workload, self.inputs
        if inputs.additional_keys is not None:
            image, kv_head = self._random(len(self.images)), self._random(w.kv_heads)
            exact, rounded = (self._key_gradients(self._everything(image), kv_head, (), r) for r in (False, True))
            for name, e, r in zip(("d_additional_keys", "d_additional_values"), exact, rounded, strict=True):
                self._samples[name] = [Sample((image, i, kv_head), e[i], r[i]) for i in range(len(e))]
        for name, tensor, count in (("d_sink", inputs.sink, SINK_SAMPLES), ("d_rpb", inputs.rpb, BIAS_SAMPLES)):
            if isinstance(tensor, Tensor):
                heads = torch.randperm(w.heads, generator=self._generator)[:count].tolist()
                self._samples[name] = [self._summed(name, head) for head in heads]

    def _summed(self, name: str, head: int) -> Sample:
        """A gradient of one head that sums over the queries of all images."""
        parts = [part for image in range(len(self.images)) for part in self._everything(image)]
        bands = [(grid, band) for grid, box in parts for band in self._bands(grid, box)]
        exact, rounded = (
            [getattr(self._rows(grid, head, band, None, r), name) for grid, band in bands] for r in (False, True)
        )
        if name == "d_rpb":
            return Sample((head,), torch.stack(exact).sum(0), torch.stack(rounded).sum(0))
        total, errors = torch.cat(exact).sum(), torch.cat(rounded) - torch.cat(exact)
        return Sample((head,), total, total + torch.maximum(errors.sum().abs(), errors.norm()))

    def _grid(self, image: int, position: tuple[int, ...]) -> tuple[Grid, tuple[int, ...]]:
        """The residue class of a token, and the token's index in it."""
        workload = self.images[image]
        window = workload.window
        residue = tuple(p % d for p, d in zip(position, window.dilation, strict=True))
        index = tuple(p // d for p, d in zip(position, window.dilation, strict=True))
        lengths = map(class_length, workload.spatial, window.dilation, residue)
        options = window.kernel_size, window.stride, window.is_causal, window.is_periodic
        key_lengths = workload.key_spatial or (None,) * len(position)
        axes = tuple(Axis(*axis) for axis in zip(lengths, *options, key_lengths, strict=True))
        return Grid(image, residue, window.dilation, axes), index

    def _everything(self, image: int) -> list[tuple[Grid, Box]]:
        """All queries of an image, class by class."""
        residues = itertools.product(*map(range, self.images[image].window.dilation))
        grids = [self._grid(image, residue)[0] for residue in residues]
        return [(grid, grid.everything) for grid in grids]

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
        """Halve a box of queries along its longest side until no piece has more pairs than ``BAND_PAIRS``."""
        sides = [b - a + 1 for a, b in box]
        if min(sides) < 1:  # queries of a key that none sees
            return
        pairs = math.prod(sides) * math.prod(b - a + 1 for a, b in self._bounds(key_bounds, box, grid))
        if pairs <= BAND_PAIRS or max(sides) == 1:
            yield box
            return
        axis = sides.index(max(sides))
        first, last = box[axis]
        middle = (first + last) // 2
        for half in ((first, middle), (middle + 1, last)):
            yield from self._bands(grid, (*box[:axis], half, *box[axis + 1 :]))

    def _bounds(self, bounds: Bounds, box: Box, grid: Grid) -> Box:
        """The smallest box with all that ``bounds`` (:func:`key_bounds` or its inverse) returns for the positions.

        On a ring it has every token once at most.
        """
        result = []
        for (a, b), axis in zip(box, grid.axes, strict=True):
            low, high = bounds(torch.arange(a, b + 1), *axis)
            first, last = int(low.min()), int(high.max())
            length = axis.keys if bounds is key_bounds else axis.length
            result.append((first, min(last, first + length - 1)) if axis.is_periodic else (first, last))
        return tuple(result)

    def _mask(self, box: Box, keys: Box, grid: Grid, device: torch.device) -> Tensor:
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        for sides in zip(box, keys, grid.axes, strict=True):
            _, first, last, distance = self._distances(*sides, device)
            visible = (distance >= 0) & (distance <= (last - first)[:, None])
            mask = (mask[:, None, :, None] & visible[None, :, None, :]).reshape(mask.shape[0] * visible.shape[0], -1)
        return mask

    def _entries(self, box: Box, keys: Box, grid: Grid, device: torch.device) -> Tensor:
        """``[n, c]``: the entry of a flat table of biases for every query and key; of pairs that are masked, any."""
        index = torch.zeros(1, 1, dtype=torch.long, device=device)
        for own, seen, axis in zip(box, keys, grid.axes, strict=True):
            query, first, _, distance = self._distances(own, seen, axis, device)
            size = 2 * axis.kernel_size - 1
            entry = (distance + (first - query)[:, None] + axis.kernel_size - 1).clamp(0, size - 1)
            index = (index[:, None, :, None] * size + entry[None, :, None, :]).flatten(0, 1).flatten(1)
        return index

    @staticmethod
    def _distances(
        queries: tuple[int, int], keys: tuple[int, int], axis: Axis, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """On one axis: queries, the first and the last key that each sees, and how far each key is behind the first."""
        query, key = (torch.arange(a, b + 1, device=device) for a, b in (queries, keys))
        first, last = key_bounds(query, *axis)
        distance = key - first[:, None]
        return query, first, last, distance % axis.keys if axis.is_periodic else distance

    def _rows(self, grid: Grid, head: int, box: Box, columns: tuple[int, ...] | None, rounding: bool) -> Rows:
        """Attention and its backward for one head and the queries of one box.

        ``columns`` selects the keys whose gradients are computed: a key's position, () for the registers, or None.
        """
        w, inputs = self.workload, self.inputs
        kv_head = head * w.kv_heads // w.heads
        # A kernel in fp32 rounds every sum, as the formula evaluated in fp32 does.
        dtype = torch.float32 if rounding and inputs.query.dtype == torch.float32 else torch.float64
        keys = self._bounds(key_bounds, box, grid)
        q, do = (self._take(t, grid, box, head).to(dtype) for t in (inputs.query, inputs.grad_out))
        k, v = (self._take(t, grid, keys, kv_head).to(dtype) for t in (inputs.key, inputs.value))
        mask = self._mask(box, keys, grid, q.device)
        if inputs.key_mask is not None:
            mask &= self._tokens(inputs.key_mask[0], grid, keys).flatten()
        entries = None if inputs.rpb is None else self._entries(box, keys, grid, q.device)
        registers = 0
        if inputs.additional_keys is not None and inputs.additional_values is not None:
            registers = inputs.additional_keys.shape[1]
            k = torch.cat([inputs.additional_keys[grid.image, :, kv_head].to(dtype), k])
            v = torch.cat([inputs.additional_values[grid.image, :, kv_head].to(dtype), v])
            mask = torch.cat([mask.new_ones(mask.shape[0], registers), mask], 1)

        scores = w.scale * q @ k.T
        if inputs.rpb is not None and entries is not None:
            scores[:, registers:] += inputs.rpb[head].to(dtype).flatten()[entries]
        scores.masked_fill_(~mask, -math.inf)
        row_max = scores.amax(-1, keepdim=True)
        row_max = row_max.masked_fill(row_max == -math.inf, 0.0)  # of a query that sees nothing
        weights = scores.sub_(row_max).exp_()
        row_sum = weights.sum(-1, keepdim=True)
        sink_weight = torch.zeros_like(row_sum)
        if inputs.sink is not None:
            logit = inputs.sink[head].to(dtype) if isinstance(inputs.sink, Tensor) else inputs.sink
            sink_weight = torch.exp(logit - row_max)
        row_sum = row_sum + sink_weight
        row_sum = torch.where(row_sum == 0, 1.0, row_sum)  # whose weights are zero, and so is its result
        out = self._round(self._round(weights, rounding) @ v / row_sum, rounding)

        delta = (do * out).sum(-1, keepdim=True)
        weights /= row_sum
        d_scores = self._round(weights * (do @ v.T - delta), rounding)
        d_rpb = None
        if inputs.rpb is not None and entries is not None:
            d_rpb = torch.zeros_like(inputs.rpb[head], dtype=dtype)
            d_rpb.view(-1).index_add_(0, entries.flatten(), d_scores[:, registers:].flatten())
        picked = slice(0, 0)
        if columns is not None:
            column = self._column(columns, keys, grid) + registers if columns else 0
            picked = slice(column, column + 1) if columns else slice(0, registers)
        return Rows(
            out=out,
            d_query=self._round(w.scale * d_scores @ k, rounding),
            d_key=w.scale * d_scores[:, picked].T @ q,
            d_value=self._round(weights[:, picked], rounding).T @ do,
            d_sink=-(sink_weight / row_sum * delta)[:, 0],
            d_rpb=d_rpb,
        )

    def _take(self, tensor: Tensor, grid: Grid, box: Box, head: int) -> Tensor:
        """The box's tokens of ``[B, *spatial, H, D]`` as ``[tokens, D]``."""
        return self._tokens(self._image(tensor, grid.image)[..., head, :], grid, box).flatten(0, -2)

    def _tokens(self, image: Tensor, grid: Grid, box: Box) -> Tensor:
        """The box of ``[*spatial, ...]``."""
        for i, (residue, d, (first, last)) in enumerate(zip(grid.residue, grid.dilation, box, strict=True)):
            start, stop = residue + d * first, residue + d * last + 1
            if start >= 0 and stop <= image.shape[i]:
                image = image[(slice(None),) * i + (slice(start, stop, d),)]
            else:  # positions on a ring are unwrapped
                image = image.index_select(i, torch.arange(start, stop, d, device=image.device) % image.shape[i])
        return image

    def _column(self, position: tuple[int, ...], box: Box, grid: Grid) -> int:
        """The index of a key among those of a box."""
        index = 0
        for p, (first, last), axis in zip(position, box, grid.axes, strict=True):
            distance = (p - first) % axis.keys if axis.is_periodic else p - first
            index = index * (last - first + 1) + distance
        return index
