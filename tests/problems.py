"""Problems of a GPU's size, from which dispatch plans without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from natten_layers.kernels.host.packing import Packing
from natten_layers.kernels.host.problem import Layout, Problem, contiguous
from natten_layers.kernels.host.tuned import forget


def problem_of_text(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), **changes: Any) -> Problem:
    """A window of 4096 over 8192 tokens with four query heads per KV head, as if there was a GPU."""
    forget()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("natten_layers.kernels.host.problem.device_traits", lambda device: ("stub", 2**17))
    query, key = (contiguous((1, 8192, h, 128)) for h in (8, 2))
    problem = Problem(
        query, key, key, None, None, torch.device("cuda", 0), torch.bfloat16, (4096,), (1,), (1,), (True,),
        "none", scale_first=False, precision="ieee",
    )  # fmt: skip
    return problem._replace(**changes)


def problem_of_packed_texts(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Problem:
    """The same window over 32768 tokens of three texts, of which one is empty."""
    query, key = (contiguous((1, 32768, h, 128)) for h in (8, 2))
    packing = Packing(((30000,), (0,), (2768,)), 1)
    return problem_of_text(monkeypatch, **{"query": query, "key": key, "value": key, "packing": packing, **changes})


def problem_of_image(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Problem:
    """A 7x7 window over eight images of 128x128 with four query heads per KV head, as if there was a GPU."""
    query, key = (contiguous((8, 128, 128, h, 64)) for h in (8, 2))
    image = {"query": query, "key": key, "value": key, "kernel_size": (7, 7), "stride": (1, 1), "dilation": (1, 1)}
    return problem_of_text(monkeypatch, **{**image, "is_causal": (False, False), **changes})


def problem_of_packed_images(
    monkeypatch: pytest.MonkeyPatch, shapes: tuple[tuple[int, ...], ...] = ((128, 128), (96, 170), (1, 40), (0, 9)),
    **changes: Any,
) -> Problem:  # fmt: skip
    """The same window over images of many shapes, one after the other."""
    packing = Packing(shapes, len(shapes[0]))
    query, key = (contiguous((1, packing.tokens, h, 64)) for h in (8, 2))
    return problem_of_image(monkeypatch, **{"query": query, "key": key, "value": key, "packing": packing, **changes})


def problem_of_projected_image(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Problem:
    """The same image, with its queries, keys and values side by side in the result of one projection."""
    query, key = (Layout((8, 128, 128, h, 64), (2**14 * 768, 2**7 * 768, 768, 64, 1)) for h in (8, 2))
    return problem_of_image(monkeypatch, **{"query": query, "key": key, "value": key, **changes})


def with_registers(registers: int, heads: int, dim: int, images: int = 8) -> dict[str, Layout]:
    """Images of 64x64 tokens, and register tokens."""
    tokens, extra = contiguous((images, 64, 64, heads, dim)), contiguous((images, registers, heads, dim))
    names = "query", "key", "value", "additional_keys", "additional_values"
    return dict(zip(names, (tokens,) * 3 + (extra,) * 2, strict=True))
