"""The variants for compute capability 9.0: what each supports (``support``), when it pays (``thresholds``), its plan.

``dispatch`` lists the variants at the end of this module in the order in which it considers them. Without Gluon the
kernels themselves are missing, and every variant says so.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..host.tuned import override_pack
from ..host.variant import Question, Variant
from ..portable.pair_variants import pair_pays
from . import large_tiling, medium_tiling, small_tiling
from .support import (
    GLUON_GAP,
    LARGE,
    MEDIUM,
    MEDIUM_PAIRS,
    ROLLING,
    TILES,
    fused_prep_gap,
    large_backward_gap,
    large_gap,
    medium_bias_gap,
    medium_gap,
    medium_jvp_gap,
    medium_pair_keys_gap,
    medium_pairs_gap,
    rolling_gap,
    tiles_gap,
)
from .thresholds import (
    fused_prep_pays,
    large_pays,
    large_registers_pay,
    medium_jvp_pays,
    medium_pays,
    packed_images_pay,
    small_backward_pays,
    small_pays,
)

if TYPE_CHECKING or GLUON_GAP is None:  # only a missing Gluon leaves these modules out; other import errors are raised
    from . import (
        large_dkv,
        large_dq,
        large_forward,
        large_registers,
        medium_backward,
        medium_bias,
        medium_forward,
        medium_jvp,
        medium_pair_gradients,
        medium_pairs,
        small_dkv,
        small_dq,
        small_forward,
        small_forward_rolling,
    )

# --- Plans

Plan = TypeVar("Plan")
NO_LARGE_TILES = "no tiles: frames are so small that chunks of them would reach into the next video of the batch"
NO_MEDIUM_TILES = "no tiles: the frames of an image cannot be divided into tiles of 64 rows"


def _tile_plan(question: Question) -> small_tiling.SmallTileConfig | str:
    config = small_tiling.small_tile_config(question.problem, override_pack(), question.with_stats)
    if config is not None and question.problem.packs_images:
        return packed_images_pay(config.programs) or config
    return config or _no_small_tiles(question)


def _no_small_tiles(question: Question) -> str:
    return small_tiling.no_small_tiles(question.problem, override_pack())


def _rolling_plan(question: Question) -> small_tiling.RollingTileConfig | str:
    p, pack = question.problem, override_pack()
    rolling = small_tiling.rolling_tile_config(p, pack, question.with_stats)
    if rolling is None:
        return _no_small_tiles(question)
    return small_tiling.rolling_gap(p, rolling, small_tiling.small_tile_config(p, pack, question.with_stats)) or rolling


def _small_query_plan(question: Question) -> small_tiling.SmallTileConfig | str:
    return small_tiling.small_dq_tile_config(question.problem, override_pack()) or _no_small_tiles(question)


def _small_key_plan(question: Question) -> small_tiling.SmallTileConfig | str:
    return small_tiling.small_dkv_tile_config(question.problem) or _no_small_tiles(question)


def _large_plan(find: Callable[..., Plan], *arguments: object) -> Plan | str:
    try:
        return find(*arguments)
    except large_tiling.NoTilesError:
        return NO_LARGE_TILES


def _medium_plan(question: Question) -> medium_tiling.MediumTileConfig | str:
    config = medium_tiling.forward_tile_config(question.problem, override_pack(), question.with_stats)
    return config or NO_MEDIUM_TILES


def _medium_query_plan(question: Question) -> medium_tiling.MediumTileConfig | str:
    return medium_tiling.dq_tile_config(question.problem, override_pack()) or NO_MEDIUM_TILES


def _medium_key_plan(question: Question) -> medium_tiling.MediumTileConfig | str:
    return medium_tiling.dkv_tile_config(question.problem, override_pack()) or NO_MEDIUM_TILES


def _medium_jvp_plan(question: Question) -> medium_tiling.MediumTileConfig | str:
    return medium_tiling.jvp_tile_config(question.problem, override_pack()) or NO_MEDIUM_TILES


def _fused_prep_plan(question: Question) -> small_tiling.RollingTileConfig | str:
    config = small_tiling.rolling_tile_config(question.problem, override_pack(), with_qk_prep=True)
    return config or _no_small_tiles(question)


# --- The variants. Lambdas look their module up when they run, as modules that need Gluon are not always imported.

LARGE_FORWARD = Variant(
    LARGE,
    supports=large_gap,
    pays=large_pays,
    plan=lambda q: _large_plan(large_tiling.forward_tile_config, q.problem, override_pack(), q.with_stats),
    run=lambda *args: large_forward.forward(*args),
    uses_tma=True,
)
LARGE_QUERY_GRADIENT = Variant(
    LARGE,
    supports=large_backward_gap,
    pays=lambda q: large_pays(q, "backward_query"),
    plan=lambda q: _large_plan(large_tiling.dq_tile_config, q.problem, override_pack()),
    run=lambda *args: large_dq.query_gradient(*args),
    uses_tma=True,
)
LARGE_KEY_GRADIENTS = Variant(
    LARGE,
    supports=large_backward_gap,
    pays=lambda q: large_pays(q, "backward_key"),
    plan=lambda q: _large_plan(large_tiling.dkv_tile_config, q.problem),
    run=lambda *args: large_dkv.key_gradients(*args),
    uses_tma=True,
)
LARGE_REGISTER_GRADIENTS = Variant(
    LARGE,
    supports=large_backward_gap,
    pays=large_registers_pay,
    plan=lambda q: _large_plan(large_tiling.register_tile_config, q.problem),
    run=lambda *args: large_registers.register_gradients(*args),
    uses_tma=True,
)
ROLLING_FORWARD = Variant(
    ROLLING,
    supports=rolling_gap,
    pays=lambda q: small_pays(q, "forward"),
    plan=_rolling_plan,
    run=lambda *args: small_forward_rolling.forward(*args),
    uses_tma=True,
)
ROLLING_PREP_FORWARD = Variant(
    ROLLING,
    supports=fused_prep_gap,
    pays=fused_prep_pays,
    plan=_fused_prep_plan,
    run=lambda plan, problem, inputs, options, prep: small_forward_rolling.forward(
        plan, problem, inputs, options, False, prep
    )[0],
    uses_tma=True,
)
TILES_FORWARD = Variant(
    TILES,
    supports=tiles_gap,
    pays=lambda q: small_pays(q, "forward"),
    plan=_tile_plan,
    run=lambda *args: small_forward.forward(*args),
    uses_tma=True,
)
TILES_QUERY_GRADIENT = Variant(
    TILES,
    supports=tiles_gap,
    pays=lambda q: small_backward_pays(q, "backward_query"),
    plan=_small_query_plan,
    run=lambda *args: small_dq.query_gradient(*args),
    uses_tma=True,
)
TILES_KEY_GRADIENTS = Variant(
    TILES,
    supports=tiles_gap,
    pays=lambda q: small_backward_pays(q, "backward_key"),
    plan=_small_key_plan,
    run=lambda *args: small_dkv.key_gradients(*args),
    uses_tma=True,
)
MEDIUM_FORWARD = Variant(
    MEDIUM,
    supports=medium_gap,
    pays=lambda q: medium_pays(q, "forward"),
    plan=_medium_plan,
    run=lambda *args: medium_forward.forward(*args),
    uses_tma=True,
)
MEDIUM_QUERY_GRADIENT = Variant(
    MEDIUM,
    supports=medium_gap,
    pays=lambda q: medium_pays(q, "backward_query"),
    plan=_medium_query_plan,
    run=lambda *args: medium_backward.query_gradient(*args),
    uses_tma=True,
)
MEDIUM_KEY_GRADIENTS = Variant(
    MEDIUM,
    supports=medium_gap,
    pays=lambda q: medium_pays(q, "backward_key"),
    plan=_medium_key_plan,
    run=lambda *args: medium_backward.key_gradients(*args),
    uses_tma=True,
)
MEDIUM_BIAS_GRADIENT = Variant(
    MEDIUM,
    supports=medium_bias_gap,
    pays=lambda q: medium_pays(q, "backward_key"),  # not timed for itself where calls are small
    plan=lambda q: medium_tiling.bias_tile_config(q.problem),
    run=lambda *args: medium_bias.bias_gradient(*args),
    uses_tma=True,
)
MEDIUM_JVP = Variant(
    MEDIUM,
    supports=medium_jvp_gap,
    pays=medium_jvp_pays,
    plan=_medium_jvp_plan,
    run=lambda *args: medium_jvp.jvp(*args),
    uses_tma=True,
)
MEDIUM_FORWARD_JVP = Variant(
    MEDIUM,
    supports=medium_jvp_gap,
    plan=_medium_jvp_plan,
    run=lambda *args: medium_jvp.forward_with_tangents(*args),
    uses_tma=True,
)
MEDIUM_PAIR_FORWARD = Variant(
    MEDIUM_PAIRS,
    supports=medium_pairs_gap,
    pays=pair_pays,
    plan=_medium_plan,
    run=lambda *args: medium_pairs.forward(*args),
    uses_tma=True,
)
MEDIUM_PAIR_QUERY_GRADIENT = Variant(
    MEDIUM_PAIRS,
    supports=medium_pairs_gap,
    pays=pair_pays,
    plan=_medium_query_plan,
    run=lambda *args: medium_pair_gradients.query_gradient(*args),
    uses_tma=True,
)
MEDIUM_PAIR_KEY_GRADIENTS = Variant(
    MEDIUM_PAIRS,
    supports=medium_pair_keys_gap,
    pays=pair_pays,
    plan=_medium_key_plan,
    run=lambda *args: medium_pair_gradients.key_gradients(*args),
    uses_tma=True,
)
