"""Windows of one axis and of several, against values computed by hand, and the functions against each other."""

from __future__ import annotations

import pytest
import torch
from helpers import raises_naming
from hypothesis import given
from hypothesis import strategies as st

from natten_layers.geometry import (
    Window,
    axis_mask,
    class_length,
    make_window,
    query_bounds,
    window_bounds,
    window_mask,
)


def windows(
    length: int, kernel: int, stride: int = 1, dilation: int = 1, causal: bool = False, periodic: bool = False
) -> list[list[int]]:
    mask = axis_mask(length, kernel, stride, dilation, causal, periodic=periodic)
    return [row.nonzero().flatten().tolist() for row in mask]


def spans(*bounds: tuple[int, int]) -> list[list[int]]:
    return [list(range(first, last + 1)) for first, last in bounds]


def test_odd_kernel_shifts_inwards_at_borders():
    assert windows(5, 3) == spans((0, 2), (0, 2), (1, 3), (2, 4), (2, 4))


def test_even_kernel_has_one_key_more_on_the_left():
    assert windows(6, 4) == spans((0, 3), (0, 3), (0, 3), (1, 4), (2, 5), (2, 5))


def test_dilation_keeps_residue_classes_apart():
    rows = windows(7, 3, dilation=2)
    assert rows[0] == [0, 2, 4]
    assert rows[1] == [1, 3, 5]
    assert rows[5] == [1, 3, 5]
    assert rows[6] == [2, 4, 6]


def test_causal_is_a_sliding_window():
    assert windows(5, 3, causal=True) == spans((0, 0), (0, 1), (0, 2), (1, 3), (2, 4))


def test_stride_shares_the_leader_window():
    assert windows(6, 3, stride=2) == spans((0, 2), (0, 2), (2, 4), (2, 4), (3, 5), (3, 5))


def test_causal_stride_ends_windows_at_the_query():
    # Leaders 1, 1, 3, 3, 4 (clamped): keys after leader - 3 and up to the query.
    assert windows(5, 3, stride=2, causal=True) == spans((0, 0), (0, 1), (1, 2), (1, 3), (2, 4))


def test_windows_wrap_around_a_ring():
    assert windows(5, 3, periodic=True) == [[0, 1, 4], [0, 1, 2], [1, 2, 3], [2, 3, 4], [0, 3, 4]]
    assert windows(6, 4, periodic=True)[0] == [0, 1, 4, 5]  # two to the left of token 0, one to the right


def test_residue_classes_of_a_ring_are_rings():
    rows = windows(6, 3, dilation=2, periodic=True)
    assert rows[0] == [0, 2, 4]
    assert rows[5] == [1, 3, 5]
    rows = windows(8, 2, dilation=2, periodic=True)
    assert rows[1] == [1, 7]
    assert rows[6] == [4, 6]


def test_the_last_group_of_a_ring_may_be_shorter_than_its_stride():
    # Leaders 2, 2, 2, 2, 5 and 5, as 6 would lie behind the end. Windows are leader - 2 .. leader + 1.
    assert windows(6, 4, stride=4, periodic=True) == [[0, 1, 2, 3]] * 4 + [[0, 3, 4, 5]] * 2


def other_grid(queries: int, keys: int, kernel: int, periodic: bool = False) -> list[list[int]]:
    mask = axis_mask(queries, kernel, 1, 1, False, periodic=periodic, key_length=keys)
    return [row.nonzero().flatten().tolist() for row in mask]


def test_queries_on_another_grid_see_the_keys_around_their_centres():
    assert other_grid(8, 4, 3) == spans(*[(0, 2)] * 4, *[(1, 3)] * 4)
    assert other_grid(4, 8, 2) == spans((0, 1), (2, 3), (4, 5), (6, 7))
    assert other_grid(1, 9, 2) == spans((3, 4))  # most keys are seen by nobody
    # Leaders 0, 0, 1, 1, 2, 2, 3 and 3.
    assert other_grid(8, 4, 3, periodic=True) == [[0, 1, 3]] * 2 + [[0, 1, 2]] * 2 + [[1, 2, 3]] * 2 + [[0, 2, 3]] * 2


def test_another_grid_of_equal_lengths_is_the_same():
    for kernel, periodic in [(1, False), (3, True), (4, False), (7, True)]:
        assert other_grid(7, 7, kernel, periodic) == windows(7, kernel, periodic=periodic)


def test_causal_dilation():
    assert windows(6, 2, dilation=2, causal=True) == [[0], [1], [0, 2], [1, 3], [2, 4], [3, 5]]


def test_kernel_one_is_the_query_itself():
    assert windows(4, 1) == [[0], [1], [2], [3]]
    assert windows(4, 1, dilation=4, causal=True) == [[0], [1], [2], [3]]


def test_full_kernel_sees_everything():
    assert windows(4, 4) == spans(*[(0, 3)] * 4)
    assert make_window((4, 5), (4, 5)).is_full((4, 5))
    assert not make_window((4, 5), (4, 5), is_causal=(False, True)).is_full((4, 5))
    assert not make_window((4, 5), (4, 4)).is_full((4, 5))
    assert make_window((4, 5), (4, 5), is_periodic=True).is_full((4, 5))


def test_axes_combine_as_a_product():
    mask = window_mask((4, 5), make_window((4, 5), (3, 2), is_causal=(False, True))).reshape(4, 5, 4, 5)
    rows, columns = axis_mask(4, 3, 1, 1, False), axis_mask(5, 2, 1, 1, True)
    for y in range(4):
        for x in range(5):
            assert torch.equal(mask[y, x], rows[y][:, None] & columns[x])


@pytest.mark.parametrize("causal", [False, True])
def test_every_window_has_kernel_keys_and_bounds_do_not_decrease(causal: bool):
    for length in range(1, 12):
        index = torch.arange(length)
        for kernel in range(1, length + 1):
            for stride in range(1, kernel + 1):
                first, last = window_bounds(index, length, kernel, stride, causal)
                assert (first.diff() >= 0).all()
                assert (last.diff() >= 0).all()
                assert (first >= 0).all()
                assert (last < length).all()
                assert (first <= index).all()
                assert (index <= last).all()
                assert (last - first < kernel).all() if causal else (last - first + 1 == kernel).all()


@pytest.mark.parametrize("causal", [False, True])
def test_query_bounds_inverts_window_bounds(causal: bool):
    for length in range(1, 13):
        index = torch.arange(length)
        for kernel in range(1, length + 1):
            for stride in range(1, kernel + 1):
                first, last = window_bounds(index, length, kernel, stride, causal)
                sees = (index >= first[:, None]) & (index <= last[:, None])  # queries by keys
                first, last = query_bounds(index, length, kernel, stride, causal)
                seen = (index[:, None] >= first) & (index[:, None] <= last)
                assert torch.equal(sees, seen), (length, kernel, stride)


def test_on_a_ring_bounds_are_unwrapped_and_each_inverts_the_other():
    """Every window has ``kernel`` different keys, and wrapping either bounds gives the same pairs, each once."""
    for length in range(1, 12):
        index = torch.arange(length)
        for kernel in range(1, length + 1):
            for stride in range(1, kernel + 1):
                first, last = window_bounds(index, length, kernel, stride, False, True)
                assert (last - first + 1 == kernel).all()
                assert (first.diff() >= 0).all()
                sees = torch.zeros(length, length, dtype=torch.int)
                for query, start in enumerate(first.tolist()):
                    sees[query, torch.arange(start, start + kernel) % length] += 1
                assert sees.max() == 1
                assert torch.equal(axis_mask(length, kernel, stride, 1, False, periodic=True), sees.bool())
                first, last = query_bounds(index, length, kernel, stride, False, True)
                assert (first.diff() >= 0).all()
                assert (last.diff() >= 0).all()
                assert (first >= -length).all()  # a turn at most, as the kernels wrap by one
                assert (last < 2 * length).all()
                seen = torch.zeros(length, length, dtype=torch.int)
                for key, (start, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
                    for query in range(start, end + 1):
                        seen[query % length, key] += 1
                assert torch.equal(seen, sees), (length, kernel, stride)


@pytest.mark.parametrize("periodic", [False, True])
def test_on_another_grid_query_bounds_invert_window_bounds(periodic: bool):
    for length in range(1, 10):
        for keys in range(1, 12):
            for kernel in range(1, keys + 1):
                sees = axis_mask(length, kernel, 1, 1, False, periodic=periodic, key_length=keys)
                assert (sees.sum(1) == kernel).all()
                first, last = query_bounds(torch.arange(keys), length, kernel, 1, False, periodic, keys)
                assert (first.diff() >= 0).all()
                assert (last.diff() >= 0).all()
                assert (first >= -length * periodic).all()
                assert (last < length * (1 + periodic)).all()
                seen = torch.zeros(length, keys, dtype=torch.int)
                for key, (start, end) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
                    for query in range(start, end + 1):
                        seen[query % length, key] += 1
                assert torch.equal(seen, sees.int()), (length, keys, kernel)


@given(st.data())
def test_window_bounds_of_an_int_equal_those_of_a_tensor(data: st.DataObject):
    length = data.draw(st.integers(1, 50))
    kernel = data.draw(st.integers(1, length))
    stride = data.draw(st.integers(1, kernel))
    causal, periodic = data.draw(st.sampled_from([(False, False), (True, False), (False, True)]))
    first, last = window_bounds(torch.arange(length), length, kernel, stride, causal, periodic)
    assert [window_bounds(i, length, kernel, stride, causal, periodic) for i in range(length)] == list(
        zip(first.tolist(), last.tolist(), strict=True)
    )


@given(length=st.integers(1, 40), dilation=st.integers(1, 40))
def test_class_lengths_count_the_tokens_of_each_class(length: int, dilation: int):
    for residue in range(dilation):
        assert class_length(length, dilation, residue) == len(range(residue, length, dilation))


def test_ints_spread_over_axes():
    assert make_window((8, 9), 3, 2, 1, True) == Window((3, 3), (2, 2), (1, 1), (True, True), (False, False))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kernel_size": (3, 0)}, ["kernel_size", "0", "width"]),
        ({"kernel_size": (-1, 3)}, ["kernel_size", "-1", "height"]),
        ({"kernel_size": (3, 10)}, ["kernel_size", "10", "width", "length 9"]),
        ({"kernel_size": 3, "dilation": (1, 4)}, ["dilation", "3 * 4", "12", "width", "length 9"]),
        ({"kernel_size": 3, "dilation": (0, 1)}, ["dilation", "0", "height"]),
        ({"kernel_size": 3, "stride": (4, 1)}, ["stride", "1..3", "4", "height"]),
        ({"kernel_size": 3, "stride": (1, 0)}, ["stride", "0", "width"]),
        ({"kernel_size": 3.0}, ["kernel_size", "3.0", "float"]),
        ({"kernel_size": (3, True)}, ["kernel_size", "True", "bool", "width"]),
        ({"kernel_size": 3, "dilation": (1, 1.5)}, ["dilation", "1.5", "float", "width"]),
        ({"kernel_size": 3, "is_causal": (True, 1)}, ["is_causal", "1", "int", "width"]),
        ({"kernel_size": 3, "is_periodic": (1, False)}, ["is_periodic", "1", "int", "height"]),
        ({"kernel_size": 3, "is_periodic": True, "is_causal": (False, True)}, ["is_causal", "is_periodic", "width"]),
        ({"kernel_size": 3, "is_periodic": True, "dilation": (2, 2)}, ["dilation 2", "length 9", "width", "ring"]),
        ({"kernel_size": (3, 3, 3)}, ["kernel_size", "3 entries", "2 spatial axes"]),
    ],
)
def test_bad_windows_name_argument_axis_and_values(arguments: dict, words: list[str]):
    with raises_naming(*words):
        make_window((8, 9), **arguments)


def test_only_a_tensor_of_integers_is_to_be_listed():
    with raises_naming("pass kernel_size.tolist()"):
        make_window((8, 9), torch.tensor([3, 3]))  # type: ignore[arg-type]
    for kernel_size in (torch.tensor(3.0), torch.tensor([]), torch.empty(2, dtype=torch.int64, device="meta")):
        with pytest.raises(ValueError, match=r"got [^;]*[Tt]ensor[^;]*$"):
            make_window((8, 9), kernel_size)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"on the height axis$"):  # of a tuple
        make_window((8, 9), (torch.tensor(3), 3))  # type: ignore[arg-type]


def test_a_window_that_exceeds_its_axis_has_ways_out_that_help():
    for length, kernel_size, dilation, ways in (
        (8, 10, 1, "a kernel_size of at most 8"),
        (9, 3, 4, "a kernel_size of at most 2 or a smaller dilation"),
        (3, 2, 4, "a smaller dilation"),
    ):
        with pytest.raises(ValueError, match=f"of length {length}; use {ways}$"):
            make_window((length,), kernel_size, 1, dilation)


def test_empty_axis_is_named():
    with pytest.raises(ValueError, match="height axis is empty"):
        make_window((3, 0, 4), 1)
