"""The launch behind the forward of large windows on compute capability 9.0, for outputs that are not to be used.

A weight of zero times NaN or inf is NaN, so that these spread to queries that do not see them, and the references of a
row's softmax may be too far from its largest score (``online_softmax.py``). The kernel for large windows flags such
parts of tiles, and the portable kernel, which keeps NaN and inf away and finds maxima, computes them once more.
"""

# Triton's language is Python to the parser only.
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportAssignmentType=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from dataclasses import replace
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from ..host.launcher import Launcher, launcher
from ..host.problem import Inputs, Options, Problem, need_wide_offsets
from ..host.tiling import head_width
from ..portable.forward import ForwardTensors, attend_tile
from ..portable.parameters import Axes, Spec, Strides
from ..portable.windows import SAMPLE_FIELDS
from .large_tiling import MULTIPROCESSORS, LargeTileConfig

FLAGS: tl.constexpr = tl.constexpr(64)  # most tiles whose flags one program reads
# Programs of the launch, if there are as many tiles, so that all multiprocessors compute where many tiles are flagged.
PROGRAMS = 2 * MULTIPROCESSORS


@triton.jit
def is_flagged(i_program, Nonfinite, Tiles, last_part, blocks, SPEC: tl.constexpr):
    """Whether a tile of a program of the portable kernel holds rows of a part that is flagged.

    Such a tile is a part, but for packed batches (``Tiles``): there parts count from the first token of the batch, and
    tiles from that of their sample, so that a tile may lie in two parts.
    """
    if Tiles is None:
        flag = tl.load(Nonfinite + i_program)
    else:
        p = Tiles + i_program // blocks * SAMPLE_FIELDS
        token = tl.load(p + 2) + (i_program // blocks - tl.load(p + 1)) * SPEC.tile[2]
        part, end = token // SPEC.tile[2], tl.minimum((token + SPEC.tile[2] - 1) // SPEC.tile[2], last_part)
        flags = Nonfinite + i_program % blocks
        flag = tl.maximum(tl.load(flags + part * blocks), tl.load(flags + end * blocks))
    return flag != 0


@triton.jit
def repair_kernel(
    Nonfinite, tensors, strides, programs, last_part, axes, group, kv_heads, registers, sink, scale,
    SPEC: tl.constexpr,
):  # fmt: skip
    """Compute the tiles that are flagged once more, by the portable kernel, which keeps NaN and inf away from queries
    that do not see them. The arguments from ``axes`` on, tensors and strides are those of ``attend_tile``.
    """
    blocks = kv_heads * (group // SPEC.pack)
    step = tl.num_programs(0)
    i_programs = tl.minimum(tl.program_id(0) + tl.arange(0, FLAGS) * step, programs - 1)
    if tl.max(is_flagged(i_programs, Nonfinite, tensors.tiles, last_part, blocks, SPEC).to(tl.int32), 0) == 0:
        return
    for i_program in range(tl.program_id(0), programs, step):
        if is_flagged(i_program, Nonfinite, tensors.tiles, last_part, blocks, SPEC):
            attend_tile(i_program, tensors, strides, axes, group, kv_heads, registers, None, sink, scale, SPEC)


def repair(
    config: LargeTileConfig, problem: Problem, inputs: Inputs, options: Options, nonfinite: Tensor,
    results: tuple[Tensor, Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """Compute the parts of tiles that ``nonfinite`` marks once more, in place."""
    query, key, value, reg_keys, reg_values, sink, *_ = inputs
    launch = prepare_repair(config, problem, results[1] is not None)
    tiles = problem.tile_table(config.part)
    tensors = ForwardTensors(query, key, value, *results, reg_keys, reg_values, sink, None, tiles)
    launch((nonfinite, tensors), (options.sink_value, options.scale))


@lru_cache(maxsize=1024)
def prepare_repair(config: LargeTileConfig, p: Problem, with_stats: bool) -> Launcher:
    programs = p.programs(replace(config, tile=config.part))
    head_dim, value_dim = p.query.shape[-1], p.value.shape[-1]
    return launcher(
        repair_kernel,
        (max(triton.cdiv(programs, FLAGS.value), min(programs, PROGRAMS)),),
        (
            Strides(*p.input_strides()), programs, p.tiles(config.part)[2] - 1, Axes(*p.extents(config.part)),
            p.group, p.kv_heads, p.registers,
        ),
        SPEC=Spec(
            head_dim, (head_width(head_dim),), value_dim, (head_width(value_dim),), precision="ieee", scale_first=False,
            causal=p.causal_axes, tile=config.part, pack=config.pack, chunk=config.chunk, rank=p.rank,
            wide=need_wide_offsets((p.query, p.key, p.value, p.out)), with_stats=with_stats,
            register_tile=16 if p.registers else 0,
        ),
        num_warps=8,
    )  # fmt: skip
