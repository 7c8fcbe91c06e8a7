"""How errors show values."""

from __future__ import annotations

import numpy as np
import torch

from natten_layers.wording import count_or_one, listed, shorten, with_type


def test_values_are_shown_on_one_line_and_cut() -> None:
    assert shorten((1, 2)) == "(1, 2)"
    assert shorten("a  b") == "'a  b'"
    assert shorten([0] * 100, 10) == "[0, 0, ..."
    assert with_type(3.0) == "3.0 of type float"

    class Lines:
        def __repr__(self) -> str:
            return "Lines(\n  1\n)"

    assert shorten(Lines()) == "Lines( 1 )"


def test_long_lists_are_counted() -> None:
    assert listed([-1, 999]) == "[-1, 999]"
    assert listed(range(8)) == "[0, 1, 2, 3, 4, 5, 6, 7]"
    assert listed(range(3000), 3) == "[0, 1, 2, ...], 3000 in all"


def test_arrays_are_shown_by_dtype_and_shape() -> None:
    assert shorten(torch.ones(2, 300, dtype=torch.bool)) == "Tensor (2, 300) of dtype torch.bool"
    assert with_type(np.zeros((4, 5))) == "ndarray (4, 5) of dtype float64"
    # A number says more than that it is one.
    assert shorten(torch.tensor(0.5)) == "tensor(0.5000)"
    assert "0.5" in shorten(np.float64(0.5))


def test_a_value_that_has_no_repr_is_shown_by_type() -> None:
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "a value of type list"


def test_lengths_of_an_axis_that_may_be_expanded() -> None:
    assert [count_or_one(n) for n in (0, 1, 2)] == ["0 or 1", "1", "2 or 1"]
