"""What the host says of tensors to TMA: the boxes that kernels for compute capability 9.0 load and store."""

from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..host.problem import Layout, Problem, strides, three_axes
from ..host.tiling import Box, head_width

Boxes = dict[str, Any]
"""All fields of a ``TensorDescriptor`` except ``base``, the tensor: they are the same for every call of a problem."""


def boxes_of(shape: list[int], strides: list[int], block_shape: list[int]) -> Boxes:
    swizzle = min(128, 2 * block_shape[-1])
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=len(shape))
    return {"shape": shape, "strides": strides, "block_shape": block_shape, "layout": layout, "padding": "zero"}


def axes_of(tensor: Layout, dilation: Box = (1, 1, 1)) -> tuple[list[int], list[int]]:
    """Sizes and strides of the axes ``batch and t, h, w, head`` of a tensor.

    A TMA descriptor has five axes, of which channels take one, so batch and t share one. With dilation, h and w are
    those of a residue class, and the first axis counts tokens, of which the first of an image and class is chosen.
    """
    batch, t, h, w, head = strides(tensor)
    size_t, size_h, size_w = three_axes(tensor.shape[1:-2], 1)
    if prod(dilation) > 1:
        _, by_h, by_w = dilation
        sizes = [tensor.shape[0] * size_h * size_w, size_h // by_h, size_w // by_w, tensor.shape[-2]]
        steps = [w, h * by_h, w * by_w, head]
    else:
        sizes = [tensor.shape[0] * size_t, size_h, size_w, tensor.shape[-2]]
        steps = [batch if size_t == 1 else t, h, w, head]
    # The stride of an axis of size one has no effect, but may be one that TMA refuses.
    return sizes, [8 if size == 1 else step for size, step in zip(sizes, steps, strict=True)]


def query_boxes(query: Layout, tile: Box, pack: int, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of queries: boxes of positions times heads."""
    sizes, steps = axes_of(query, dilation)
    dim = query.shape[-1]
    return boxes_of([*sizes, dim], [*steps, 1], [*tile, pack, head_width(dim)])


def key_boxes(tensor: Layout, box: Box, dilation: Box = (1, 1, 1)) -> Boxes:
    """The descriptor of keys or values: boxes of positions of one head."""
    (*sizes, heads), (*steps, head) = axes_of(tensor, dilation)
    dim = tensor.shape[-1]
    return boxes_of([heads, *sizes, dim], [head, *steps, 1], [1, *box, head_width(dim)])


def register_boxes(registers: Layout, rows: int) -> Boxes:
    """The descriptor of register tokens: boxes of one head. Tokens that all images share are stored once."""
    batch, *counts, dim = registers.shape
    steps = [step if size > 1 else 8 for size, step in zip(registers.shape, registers.stride, strict=True)][:3]
    if registers.stride[0] == 0:
        batch, steps[0] = 1, 8
    return boxes_of([batch, *counts, dim], [*steps, 1], [1, rows, 1, head_width(dim)])


def chunks_of_registers(problem: Problem, chunk: Box) -> list[Boxes | None]:
    """The descriptors of the register tokens' keys and values; None without any."""
    registers = problem.additional_keys, problem.additional_values
    return [None if x is None else register_boxes(x, prod(chunk)) for x in registers]


def descriptor(tensor: Tensor, boxes: Boxes) -> TensorDescriptor:
    """A ``TensorDescriptor`` made without the checks of its constructor.

    The checks take the host longer than a launch does, and every problem is checked once (``variants.is_addressable``).
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {**boxes, "base": tensor}
    return made


@lru_cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
