"""Which calls take the kernels for windows between small and large on compute capability 9.0; no test needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import problem_of_image, problem_of_text, with_registers

pytest.importorskip("triton.experimental.gluon")

from test_sm90_medium import MEDIUM

from natten_layers.kernels import dispatch
from natten_layers.kernels.dispatch import Question
from natten_layers.kernels.host.problem import Layout, Problem, contiguous
from natten_layers.kernels.host.tuned import override
from natten_layers.kernels.portable import forward, pair_variants
from natten_layers.kernels.sm90 import medium_tiling, variants
from natten_layers.kernels.sm90.medium_tiling import MediumTileConfig


def lumina(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Problem:
    """Four images of 64x64 with 24 heads of 96 channels and windows of 17x17: 27744 key elements."""
    query, key = (contiguous((4, 64, 64, h, 96)) for h in (24, 8))
    image = {"query": query, "key": key, "value": key, "kernel_size": (17, 17)}
    return problem_of_image(monkeypatch, **{**image, **changes})


def names(problem: Problem) -> list[str]:
    """The kernels of the forward pass, of dQ and of dK and dV."""
    query, key, *_ = dispatch.choose_backward(Question(problem, True, contiguous(problem.query.shape)))
    return [dispatch.choose("forward", Question(problem)).variant.name, query.variant.name, key.variant.name]


def test_windows_between_small_and_large_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = lumina(monkeypatch)
    assert names(problem) == [variants.MEDIUM] * 3
    choice = dispatch.choose("forward", Question(problem))
    assert choice.plan == MediumTileConfig((1, 8, 8), (1, 8, 8), 64, 1, 1, (64, 32), 2, 168, False, 0, False, True)
    assert [name for name, _ in choice.passed_over] == [variants.ROLLING, variants.TILES]


@pytest.mark.parametrize(
    ("window", "registers", "dim", "images", "dilation", "expected"),
    [
        (13, 16, 64, 8, 1, [variants.MEDIUM] * 3),
        (21, 16, 64, 8, 1, [variants.MEDIUM] * 3),
        (21, 128, 64, 8, 1, [variants.MEDIUM] * 3),
        (13, 128, 64, 8, 2, [variants.MEDIUM] * 3),
        (43, 199, 64, 8, 1, [variants.LARGE, variants.LARGE, variants.MEDIUM]),  # which does not see register tokens
        (43, 198, 64, 8, 1, [variants.MEDIUM] * 3),
    ],
)
def test_register_tokens_count_as_keys(
    monkeypatch: pytest.MonkeyPatch, window: int, registers: int, dim: int, images: int, dilation: int,
    expected: list[str],
) -> None:  # fmt: skip
    tensors = with_registers(registers, 8, dim, images)
    problem = problem_of_image(monkeypatch, **tensors, kernel_size=(window,) * 2, dilation=(dilation,) * 2)
    assert names(problem) == expected


@pytest.mark.parametrize(
    ("dim", "window", "expected"),
    [
        (80, 819, [variants.MEDIUM] * 3),
        (80, 820, [variants.MEDIUM, variants.LARGE, variants.MEDIUM]),
        (80, 1638, [variants.MEDIUM, variants.LARGE, variants.MEDIUM]),
        (80, 1639, [variants.LARGE] * 3),
        (128, 63, [variants.TILES] * 3),
        (128, 65, [variants.TILES, variants.TILES, variants.MEDIUM]),
        (128, 128, [variants.TILES, variants.MEDIUM, variants.MEDIUM]),
        (128, 511, [variants.MEDIUM] * 3),
        (128, 512, [variants.LARGE] * 3),
        (64, 63, [variants.TILES] * 3),
        (64, 129, [variants.TILES, variants.TILES, variants.MEDIUM]),
        (64, 255, [variants.TILES, variants.MEDIUM, variants.MEDIUM]),
        (64, 256, [variants.MEDIUM] * 3),
        (64, 2559, [variants.MEDIUM] * 3),
        (64, 2560, [variants.MEDIUM, variants.LARGE, variants.LARGE]),
        (64, 5120, [variants.LARGE] * 3),
        (48, 511, [variants.MEDIUM] * 3),
        (40, 511, [variants.MEDIUM, "portable", variants.MEDIUM]),
        (40, 820, [variants.LARGE, "portable", variants.MEDIUM]),
        (32, 5119, [variants.MEDIUM, variants.LARGE, variants.MEDIUM]),
    ],
)
def test_windows_of_one_axis_take_what_was_fastest(
    monkeypatch: pytest.MonkeyPatch, dim: int, window: int, expected: list[str]
) -> None:
    tokens = contiguous((4, 16384, 8, dim))
    problem = problem_of_text(monkeypatch, kernel_size=(window,), **dict.fromkeys(("query", "key", "value"), tokens))
    assert names(problem) == expected


@pytest.mark.parametrize(("tokens", "dilation", "window"), [(16384, 2, 400), (16384, 2, 1000), (8192, 1, 400)], ids=str)
def test_what_large_windows_do_not_take_stays(
    monkeypatch: pytest.MonkeyPatch, tokens: int, dilation: int, window: int
) -> None:
    """Dilation, and calls that are too small for them."""
    heads = dict.fromkeys(("query", "key", "value"), contiguous((1, tokens, 16, 128)))
    problem = problem_of_text(monkeypatch, **heads, kernel_size=(window,), dilation=(dilation,))
    assert names(problem) == [variants.MEDIUM] * 3


def test_small_windows_keep_what_medium_ones_have_no_tiles_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of 3x8 tokens, of which no tile has 64 rows."""
    query, keys = (contiguous((2048, 3, 3, 8, heads, 64)) for heads in (8, 2))
    axes = {"kernel_size": (3,) * 3, "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (True, False, False)}
    problem = problem_of_text(monkeypatch, query=query, key=keys, value=keys, **axes)
    assert medium_tiling.dq_tile_config(problem) is None
    assert names(problem)[:2] == [variants.TILES] * 2


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (1, [variants.MEDIUM, variants.MEDIUM, variants.MEDIUM]),
        (4, [variants.ROLLING, variants.MEDIUM, variants.MEDIUM]),
    ],
)
def test_heads_that_share_keys_stay_in_tiles_for_small_windows(
    monkeypatch: pytest.MonkeyPatch, group: int, expected: list[str]
) -> None:
    query, keys = contiguous((1, 16384, 32, 64)), contiguous((1, 16384, 32 // group, 64))
    problem = problem_of_text(
        monkeypatch, kernel_size=(256,), is_causal=(True,), query=query, key=keys, value=keys
    )  # fmt: skip
    assert names(problem) == expected


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"window": 9, "dim": 56}, [variants.ROLLING, variants.MEDIUM, variants.MEDIUM]),
        ({"window": 8, "dim": 64, "stride": 4}, [variants.TILES, variants.TILES, variants.MEDIUM]),
        ({"window": 8, "dim": 32, "stride": 4}, [variants.TILES] * 3),
        ({"window": 9, "dim": 32}, [variants.ROLLING, variants.TILES, variants.MEDIUM]),
        ({"window": 7, "dim": 64}, [variants.ROLLING, variants.TILES, variants.TILES]),
        ({"window": 7, "dim": 32, "dilation": 4}, [variants.TILES, variants.TILES, variants.MEDIUM]),
        ({"window": 7, "dim": 80}, [variants.MEDIUM] * 3),
        ({"window": 11, "dim": 40}, ["portable", "portable", variants.MEDIUM]),
        ({"window": 13, "dim": 32}, [variants.MEDIUM] * 3),
    ],
    ids=str,
)
def test_windows_of_two_axes_take_what_was_fastest(
    monkeypatch: pytest.MonkeyPatch, image: dict[str, int], expected: list[str]
) -> None:
    tokens = contiguous((8, 96, 96, 8, image["dim"]))
    window = {"kernel_size": (image["window"],) * 2}
    window |= {name: (image.get(name, 1),) * 2 for name in ("stride", "dilation")}
    problem = problem_of_image(monkeypatch, **window, **dict.fromkeys(("query", "key", "value"), tokens))
    assert names(problem) == expected


@pytest.mark.parametrize(("images", "expected"), [(8, variants.MEDIUM), (7, "portable")])
def test_gradients_of_keys_take_it_in_smaller_calls(
    monkeypatch: pytest.MonkeyPatch, images: int, expected: str
) -> None:
    tokens = dict.fromkeys(("query", "key", "value"), contiguous((images, 64, 64, 8, 40)))
    assert names(problem_of_image(monkeypatch, **tokens, kernel_size=(9, 9)))[1:] == ["portable", expected]


@pytest.mark.parametrize(("width", "expected", "side"), [(120, variants.MEDIUM, 0), (240, variants.LARGE, 8)])
def test_where_lines_of_keys_exceed_the_l2_cache(
    monkeypatch: pytest.MonkeyPatch, width: int, expected: str, side: int
) -> None:
    """Tiles are taken in columns, and larger ones are faster for dK and dV."""
    video = contiguous((1, 61, 136, width, 4, 64))
    axes = {"kernel_size": (11,) * 3, "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (False,) * 3}
    problem = problem_of_text(monkeypatch, query=video, key=video, value=video, **axes)
    assert names(problem) == [variants.MEDIUM, variants.MEDIUM, expected]
    assert dispatch.choose("forward", Question(problem)).plan.side == side


def test_tuning_and_overrides_win(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = lumina(monkeypatch)
    with override(portable_only=True):
        assert names(problem) == ["portable"] * 3
    with override({"backward_query": forward.tile_config_for("backward_query", problem.problem_class)}):
        assert names(problem) == [variants.MEDIUM, "portable", variants.MEDIUM]
    with override(variants=dict.fromkeys(MEDIUM, variants.LARGE)):
        assert names(problem) == [variants.LARGE] * 3
    small = problem_of_image(monkeypatch)
    with override(variants=MEDIUM):
        assert names(small) == [variants.MEDIUM] * 3
    grouped = lumina(monkeypatch, query=contiguous((4, 64, 64, 16, 96)))
    with override(pack=2):
        choice = dispatch.choose("forward", Question(grouped))
    assert (choice.variant.name, choice.plan.pack) == (variants.MEDIUM, 2)
    with override(pack=4):  # more heads than there are in a group
        assert dispatch.choose("forward", Question(grouped)).is_portable
    with override(pack=3):  # of which no number fills 64 rows
        assert dispatch.choose("forward", Question(lumina(monkeypatch))).is_portable


WIDE = contiguous((4, 64, 64, 8, 64))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": WIDE}, "equally many channels, not 96 and 64"),
        (
            {"kernel_size": (5, 7), **dict.fromkeys(("query", "key", "value"), contiguous((4, 64, 64, 24, 136)))},
            "heads of up to 128 channels, not 136",
        ),
        (
            dict.fromkeys(("additional_keys", "additional_values"), Layout((4, 5, 8, 96), (5 * 772, 772, 96, 1))),
            "TMA cannot address additional_keys",
        ),
        (
            {
                **dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 8, 96))),
                **dict.fromkeys(("additional_keys", "additional_values"), contiguous((1, 50, 8, 96))),
            },
            f"339 keys, additional keys included, of 96 elements are fewer than {2**30 * 3 // 2} products",
        ),
        (
            {"kernel_size": (6, 4), **dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 24, 80)))},
            "24 keys are fewer than",
        ),
        (
            {"kernel_size": (11, 11), **dict.fromkeys(("query", "key", "value"), contiguous((4, 64, 64, 24, 40)))},
            "the portable kernel is faster for heads of 40 channels on 2 axes",
        ),
        (dict.fromkeys(("query", "key", "value"), contiguous((1, 64, 64, 8, 96))), "the call is small"),
        ({"dilation": (1, 3)}, "does not divide"),
    ],
    ids=str,
)
def test_why_it_is_passed_over(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str) -> None:
    choice = dispatch.choose("forward", Question(lumina(monkeypatch, **changes)))
    assert choice.is_portable
    assert reason in {passed.kernel: passed.reason for passed in choice.passed_over}[variants.MEDIUM]


@pytest.mark.parametrize(
    "changes",
    [{"is_causal": (False,), "is_periodic": (True,)}, {"key_mask": contiguous((1, 8192, 1, 1))}, {"has_bias": True}],
    ids=str,
)
def test_what_kernels_for_large_windows_lack_takes_it_at_any_size(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    assert names(problem_of_text(monkeypatch)) == [variants.LARGE] * 3
    assert names(problem_of_text(monkeypatch, **changes)) == [variants.MEDIUM] * 3


def test_biases_take_it_in_calls_that_are_small_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for images, expected in ((64, variants.MEDIUM), (16, "portable")):
        tokens = dict.fromkeys(("query", "key", "value"), contiguous((images, 56, 56, 4, 32)))
        assert names(problem_of_image(monkeypatch, **tokens, has_bias=True, scale_first=True)) == [expected] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"is_periodic": (False, True)},
        {"key_mask": contiguous((4, 64, 64, 1, 1))},
        {"has_bias": True, "scale_first": True},
        {"query": contiguous((4, 128, 128, 24, 96))},
        {"is_periodic": (True, True), "key_mask": contiguous((4, 64, 64, 1, 1)), "has_bias": True},
    ],
    ids=str,
)
def test_rings_masks_biases_and_other_grids_take_it(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    assert names(lumina(monkeypatch, **changes)) == [variants.MEDIUM] * 3


@pytest.mark.parametrize(("images", "expected"), [(1, variants.MEDIUM), (2, "portable")])
@pytest.mark.parametrize(("frames", "is_periodic"), [(16, (True, False, False)), (32, ())])
def test_only_a_single_video_may_be_periodic_in_time_or_have_other_frames(
    monkeypatch: pytest.MonkeyPatch, images: int, expected: str, frames: int, is_periodic: tuple[bool, ...]
) -> None:
    """Where TMA reads past its last frame, the next video begins."""
    query, video = (contiguous((images, n, 32, 32, 8, 64)) for n in (frames, 16))
    axes = {"kernel_size": (5, 7, 7), "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (False,) * 3}
    problem = problem_of_text(monkeypatch, query=query, key=video, value=video, **axes, is_periodic=is_periodic)
    assert names(problem) == [expected] * 3


def test_videos_whose_frames_no_tile_divides_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three frames of 4x4 take tiles of four frames, which TMA would write into the next video."""
    video = Layout((2**13, 3, 4, 4, 1, 64), contiguous((2**13, 3, 4, 4, 1, 64)).stride)
    axes = {"kernel_size": (3, 3, 3), "stride": (1,) * 3, "dilation": (1,) * 3, "is_causal": (False,) * 3}
    problem = problem_of_text(monkeypatch, query=video, key=video, value=video, **axes)
    assert medium_tiling.forward_tile_config(problem) is None
    with override(variants=MEDIUM):
        assert names(problem) == ["portable"] * 3


@pytest.mark.parametrize("name", [variants.MEDIUM, variants.LARGE, variants.TILES])
def test_no_kernel_has_heads_that_do_not_divide_a_group(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Not even one that is asked for by name: programs of two heads would leave out the last of three."""
    query, key = (contiguous((2, 96, 96, h, 64)) for h in (3, 1))
    problem = problem_of_image(monkeypatch, query=query, key=key, value=key, kernel_size=(7, 7))
    kernels = dict.fromkeys(MEDIUM, name)
    with override(variants=kernels):
        assert names(problem) == [name] * 3
    with override(pack=1, variants=kernels):
        assert names(problem) == [name] * 3
    for pack in (2, 3, 4):
        with override(pack=pack, variants=kernels):
            assert names(problem) == ["portable", "portable", name]
            reasons = dict(dispatch.choose("forward", Question(problem)).passed_over)
            assert f"{pack} heads a program" in reasons[name]


@pytest.mark.parametrize(("spatial", "window"), [((256, 4096), 21), ((512, 2048), 13)], ids=str)
def test_gradients_stay_where_windows_are_too_small_for_larger_tiles(
    monkeypatch: pytest.MonkeyPatch, spatial: tuple[int, int], window: int
) -> None:
    """However much the lines exceed the cache: otherwise dK and dV would be left to portable kernels."""
    heads = contiguous((1, *spatial, 8, 64))
    problem = problem_of_image(monkeypatch, query=heads, key=heads, value=heads, kernel_size=(window,) * 2)
    assert medium_tiling.bytes_of_lines(problem) > medium_tiling.LINES_BYTES
    assert names(problem) == [variants.MEDIUM] * 3


@pytest.mark.parametrize(("images", "takes"), [(1, variants.MEDIUM), (8, variants.LARGE)])
def test_large_windows_of_small_calls_take_what_large_calls_leave(
    monkeypatch: pytest.MonkeyPatch, images: int, takes: str
) -> None:
    """Kernels for large windows need a large call, and portable ones are slower than those for medium windows."""
    heads = contiguous((images, 64, 64, 8, 96))
    problem = problem_of_image(monkeypatch, query=heads, key=heads, value=heads, kernel_size=(31, 31))
    assert names(problem) == [takes] * 3


@pytest.mark.parametrize(("registers", "takes"), [(0, variants.MEDIUM_PAIRS), (5, pair_variants.PAIRS)])
def test_registers_leave_gradients_of_keys_in_fp32_where_they_are(
    monkeypatch: pytest.MonkeyPatch, registers: int, takes: str
) -> None:
    """Once there is a softmax, registers do not matter to the gradients of other keys."""
    heads = contiguous((4, 64, 64, 8, 64))
    extra = contiguous((4, registers, 8, 64)) if registers else None
    problem = problem_of_image(
        monkeypatch, query=heads, key=heads, value=heads, kernel_size=(9, 9), dtype=torch.float32,
        precision="tf32x3", additional_keys=extra, additional_values=extra,
    )  # fmt: skip
    assert names(problem) == [takes, takes, variants.MEDIUM_PAIRS]
