"""Tiles of the kernels for large windows on compute capability 9.0. Needs neither Triton nor Gluon."""

from functools import lru_cache
from itertools import product
from math import prod

from ...geometry import query_bounds, window_bounds
from ..host.problem import Problem
from ..host.tiling import Axis, Bounds, Box, TileConfig, boxes, executed, spans
from .small_tiling import most_packed

# Rows of a tile: positions times packed heads.
ROWS = 128
# Columns of a chunk. The kernel of dK and dV keeps twice as many accumulators and takes half as many.
COLUMNS = 128
# Stages of the ring of chunks in shared memory.
STAGES = 2
# Queries whose statistics TMA loads together: at least 16 bytes, at addresses that are multiples of 16 bytes.
ALIGNMENT = 4


def forward_tile_config(problem: Problem, pack: int | None = None) -> TileConfig:
    """Tiles of the forward; ``pack`` heads a program, if given: a power of two that divides the group."""
    return _query_tile_config(problem, pack, COLUMNS // 2 if is_wide(problem) else COLUMNS)


def dq_tile_config(problem: Problem, pack: int | None = None) -> TileConfig:
    """Tiles of the kernel of dQ, which keeps the tile of a second tensor, the output gradient, in shared memory."""
    return _query_tile_config(problem, pack, COLUMNS // 4 if is_wide(problem) else COLUMNS)


def _query_tile_config(problem: Problem, pack: int | None, columns: int) -> TileConfig:
    pack = pack or most_packed(problem)
    tile, chunk = best_boxes(problem.axes, ROWS // pack, columns, window_bounds, batch=problem.query.shape[0])
    return TileConfig(tile, chunk, pack, num_warps=4, stages=STAGES, maxnreg=168)


def is_wide(problem: Problem) -> bool:
    """Whether heads are so wide that shared memory holds smaller tiles, and a thread the accumulators of one result
    only.
    """
    return max(problem.query.shape[-1], problem.value.shape[-1]) > 128


def dkv_tile_config(problem: Problem) -> TileConfig:
    """Tiles of the kernel of dK and dV, whose rows are keys.

    In 1-D there is one buffer of tiles (``large_dkv.buffered_tiles``), which leaves room for another stage.
    """
    wide = is_wide(problem)
    rows = ROWS // 2 if wide else ROWS
    tile, chunk = best_boxes(problem.axes, rows, COLUMNS // 2, query_bounds, ALIGNMENT, problem.query.shape[0])
    stages = STAGES if problem.rank > 1 or wide else STAGES + 1
    return TileConfig(tile, chunk, pack=1, num_warps=4, stages=stages, maxnreg=168)


@lru_cache(maxsize=1024)
def best_boxes(
    axes: tuple[Axis, ...], rows: int, columns: int, bounds: Bounds, alignment: int = 1, batch: int = 1
) -> tuple[Box, Box]:
    """The tile and the chunk that execute the fewest scores, borders included; of equals those with the longest rows.

    Args:
        bounds: what the rows see.
        alignment: chunks start at multiples of it along the last axis.
        batch: if there is more than one image, chunks must end with the last frame. TMA would load the first frames of
            the next image behind it, and although their weights are zero, zero times NaN is NaN.
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
    """Whether no walk of chunks reaches past the end of an axis. Chunks of one position never do."""
    low, high = spans(axis, tile, bounds)
    return bool((low + (high - low + chunk) // chunk * chunk <= axis[0]).all())
