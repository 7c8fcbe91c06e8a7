"""The eager path against the released ``natten`` package, whose Flex backend runs on the CPU."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import natten_layers
from natten_layers import neighborhood_attention

natten = pytest.importorskip("natten")


def random_axis(rng: random.Random) -> tuple[int, int, int, int, bool]:
    kernel = rng.randint(2, 5)  # natten asks for at least 2
    dilation = rng.randint(1, 2)
    length = kernel * dilation + rng.randint(0, 5)
    return length, kernel, rng.randint(1, kernel), dilation, rng.random() < 0.4


# Both come from natten's own call into torch.
@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_equals_natten(rank: int, seed: int):
    rng = random.Random(10 * rank + seed)
    lengths, kernel, stride, dilation, causal = zip(*(random_axis(rng) for _ in range(rank)), strict=True)
    kv_heads, group = rng.choice([(1, 3), (2, 2), (2, 1)])
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(2, *lengths, heads, 8, generator=generator) for heads in (kv_heads * group, kv_heads, kv_heads)
    )
    arguments: dict[str, Any] = {"stride": stride, "dilation": dilation, "is_causal": causal}
    repeated = (t.repeat_interleave(group, -2) for t in (key, value))
    expected = getattr(natten, f"na{rank}d")(query, *repeated, kernel, backend="flex-fna", **arguments)
    actual = neighborhood_attention(query, key, value, kernel, impl="eager", **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


# As above.
@pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("library", [natten, natten_layers], ids=["natten", "natten_layers"])
def test_one_program_for_both(library: Any):
    """Windows and more keys by hand: equal in either library to the operation that takes both."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 5, 6, 2, 8, generator=generator) for _ in range(3))
    more_keys, more_values = (torch.randn(2, 7, 2, 8, generator=generator) for _ in range(2))
    near, near_lse = library.na2d(query, key, value, (3, 4), backend="flex-fna", return_lse=True)
    far, far_lse = library.attention(query.flatten(1, 2), more_keys, more_values, backend="flex-fmha", return_lse=True)
    merged, _ = library.merge_attentions(
        [near.flatten(1, 2), far], [near_lse.flatten(1, 2), far_lse], torch_compile=False, use_autograd_fix=False
    )
    expected = neighborhood_attention(
        query, key, value, (3, 4), additional_keys=more_keys, additional_values=more_values
    )
    torch.testing.assert_close(merged.unflatten(1, (5, 6)), expected, rtol=1e-5, atol=2e-6)
