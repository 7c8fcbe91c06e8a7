"""Tiles of the kernels for large windows on compute capability 9.0. Needs neither Triton nor Gluon."""

from functools import lru_cache
from itertools import product
from math import prod

from ...geometry import query_bounds, window_bounds
from ..host.problem import Problem
from ..host.tiling import Axis, Bounds, Box, Launch, boxes, spans
from .small_tiling import most_packed

ROWS = 128  # of a tile: positions times packed heads
COLUMNS = 128  # of a chunk; the kernel of key gradients keeps twice as many accumulators and takes half of it
STAGES = 2  # chunks in shared memory
ALIGNMENT = 4  # statistics of queries: TMA loads 16 bytes at least, from multiples of as many


def launch_of(problem: Problem, pack: int | None = None) -> Launch:
    """The launch over queries of a problem, with ``pack`` heads a program if given: a power of two in the group."""
    return _query_launch(problem, pack, COLUMNS // 2 if is_wide(problem) else COLUMNS)


def query_launch_of(problem: Problem, pack: int | None = None) -> Launch:
    """The same of the gradients of queries, which keep a second tensor's tile in shared memory."""
    return _query_launch(problem, pack, COLUMNS // 4 if is_wide(problem) else COLUMNS)


def _query_launch(problem: Problem, pack: int | None, columns: int) -> Launch:
    pack = pack or most_packed(problem)
    tile, chunk = best_boxes(problem.axes, ROWS // pack, columns, window_bounds, batch=problem.query.shape[0])
    return Launch(tile, chunk, pack, num_warps=4, stages=STAGES, max_registers=168)


def is_wide(problem: Problem) -> bool:
    """Whether heads are so wide that shared memory holds smaller tiles, and a thread one result's sums."""
    return max(problem.query.shape[-1], problem.value.shape[-1]) > 128


def key_launch_of(problem: Problem) -> Launch:
    """The launch over keys. In 1-D there is one buffer of tiles (``buffered_tiles``), which leaves room for a stage."""
    wide = is_wide(problem)
    rows = ROWS // 2 if wide else ROWS
    tile, chunk = best_boxes(problem.axes, rows, COLUMNS // 2, query_bounds, ALIGNMENT, problem.query.shape[0])
    stages = STAGES if problem.rank > 1 or wide else STAGES + 1
    return Launch(tile, chunk, pack=1, num_warps=4, stages=stages, max_registers=168)


@lru_cache(maxsize=1024)
def best_boxes(
    axes: tuple[Axis, ...], rows: int, columns: int, bounds: Bounds, alignment: int = 1, batch: int = 1
) -> tuple[Box, Box]:
    """The tile and the chunk that execute the fewest scores, borders included; of equals those with the longest rows.

    ``bounds`` says what the rows see; chunks along the last axis start at multiples of ``alignment``. In a batch they
    end with the last frame: TMA would load the first ones of the next image behind it, and a weight of zero times NaN
    is NaN.
    """
    lengths = axes[0][0], axes[1][0], axes[2][0]

    def cost(pair: tuple[Box, Box]) -> tuple[int, int]:
        tile, chunk = pair
        alignments = 1, 1, alignment
        scores = (executed(axes[i], tile[i], chunk[i], bounds, alignments[i]) for i in range(3))
        return prod(scores), -tile[2] - chunk[2]

    chunks = [chunk for chunk in boxes(columns, lengths) if chunk[2] >= alignment]
    pairs = product(boxes(rows, lengths), chunks)
    return min((x for x in pairs if batch == 1 or ends_inside(axes[0], x[0][0], x[1][0], bounds)), key=cost)


@lru_cache(maxsize=4096)
def ends_inside(axis: Axis, tile: int, chunk: int, bounds: Bounds) -> bool:
    """Whether no walk of chunks reaches past the end of an axis. Those of one position never do."""
    low, high = spans(axis, tile, bounds)
    return bool((low + (high - low + chunk) // chunk * chunk <= axis[0]).all())


@lru_cache(maxsize=4096)
def executed(axis: Axis, tile: int, chunk: int, bounds: Bounds, alignment: int) -> int:
    """Pairs of a row and a column along an axis that a kernel computes."""
    low, high = spans(axis, tile, bounds)
    low = low // alignment * alignment
    return int(((high - low + chunk).clamp(min=0) // chunk).sum()) * tile * chunk
