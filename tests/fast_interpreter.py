"""Triton's interpreter without work that it repeats, which took most of its time."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import FunctionType, ModuleType
from typing import Any

import fast_language
import numpy as np


def speed_up(interpreter: Any) -> None:
    """Make ``triton.runtime.interpreter`` faster, for tests; numbers stay the same, but those of ``fma``."""
    fast_language.speed_up(interpreter.tl.core, interpreter.TritonSemantic)
    _patch_language_once_a_launch(interpreter)
    _look_up_types_once(interpreter)
    _skip_checks_of_overflow(interpreter)
    _call_functions_directly(interpreter)
    _make_constants_once(interpreter)
    _take_equal_types_as_they_are(interpreter)
    _round_sums_of_products_once(interpreter)


def _round_sums_of_products_once(interpreter: Any) -> None:
    """Round ``fma`` in fp32 almost as GPUs do, from fp64 in place of the exact sum. Kernels subtract multiples of
    pi / 2 by it, and the interpreter rounds the product, too.
    """

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data  # a product of numbers in fp32 has 48 bits
        return interpreter.TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


def _call_functions_directly(interpreter: Any) -> None:
    """Call the language's functions without a check, in between, of the argument that is given here."""
    semantic = interpreter.interpreter_semantic

    def patch(module: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(module, name, call)

    interpreter._patch_attr = patch


def _take_equal_types_as_they_are(interpreter: Any) -> None:
    """Return operands of a type that results have, too, without a search for that type and casts to it.

    So for numbers in a kernel's source, which become constants of the other operand's type. Beside a block, a scalar
    becomes one whose elements are all the same place in memory: no operation writes into its operands.
    """
    language, semantic = interpreter.tl, interpreter.interpreter_semantic
    check, broadcast, tensor = semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value, language.tensor
    accepted = {language.int32: (int,), language.int64: (int,), language.float32: (int, float)}
    numbers = {id(dtype): kinds for dtype, kinds in accepted.items()}  # types of pointers have no hash

    def like(scalar: Any, block: Any) -> Any:
        data = scalar.handle.data.astype(interpreter._get_np_dtype(scalar.dtype), copy=False)
        shape = tuple(block.type.shape)
        spread = np.ndarray(shape, data.dtype, data, 0, (0,) * len(shape))
        return tensor(interpreter.TensorHandle(spread, scalar.dtype), block.type)

    def alike(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if not rhs.type.is_block():
            return lhs, like(rhs, lhs)
        return (like(lhs, rhs), rhs) if not lhs.type.is_block() else broadcast(lhs, rhs)

    def constant(value: Any, other: Any) -> Any:
        """The number as a scalar of the type of the other operand, or as it is if results have another one."""
        if other.__class__ is tensor and value.__class__ in numbers.get(id(other.dtype), ()) and abs(value) < 2**31:
            return semantic.scalar_constant(value, other.dtype)
        return value

    def check_types(lhs: Any, rhs: Any, *options: Any, **more: Any) -> tuple[Any, Any]:
        left = lhs if lhs.__class__ is tensor else constant(lhs, rhs)
        right = rhs if rhs.__class__ is tensor else constant(rhs, lhs)
        if left.__class__ is right.__class__ is tensor and left.dtype is right.dtype and id(left.dtype) in numbers:
            return alike(left, right)
        return check(lhs, rhs, *options, **more)

    semantic.binary_op_type_checking_impl = check_types


def _make_constants_once(interpreter: Any) -> None:
    """Remember scalars and the types of results; numbers in a kernel's source became new values in each operation."""
    semantic = interpreter.interpreter_semantic
    semantic.scalar_constant = functools.lru_cache(1024, typed=True)(semantic.scalar_constant)
    semantic.computation_type_impl = functools.cache(semantic.computation_type_impl)


def _skip_checks_of_overflow(interpreter: Any) -> None:
    """Leave out what the interpreter computes for each integer sum and product, and looks at only while debugging."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=builder.options.debug)


def _patch_language_once_a_launch(interpreter: Any) -> None:
    """Let calls of device functions find ``triton.language`` as their kernel's launch has patched it.

    The interpreter replaces hundreds of functions of that module when a kernel is launched, restores them when it ends,
    and replaces them again, to the same effect, in every call of a device function in between.
    """
    patch_language, in_place = interpreter._patch_lang, set()

    @functools.cache
    def modules_seen_by(function: FunctionType) -> frozenset[str]:
        language = interpreter.tl, interpreter.tl.core
        visible = (value for value in function.__globals__.values() if isinstance(value, ModuleType))
        return frozenset(module.__name__ for module in visible if module in language)

    def patch(function: FunctionType) -> Any:
        modules = modules_seen_by(function)
        if modules in in_place:
            return None  # calls of device functions do not use it
        scope = patch_language(function)
        in_place.add(modules)
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            in_place.clear()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch


def _look_up_types_once(interpreter: Any) -> None:
    """Remember NumPy's type of each of Triton's; the interpreter makes a table of all of them for each question."""
    look_up, known = interpreter._get_np_dtype, {}

    def get_np_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in known:
            known[name] = look_up(type)
        return known[name]

    interpreter._get_np_dtype = get_np_dtype
