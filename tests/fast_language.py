"""Triton's language without what it works out anew for every value, in its interpreter and when it compiles."""

from __future__ import annotations

from typing import Any, NamedTuple


class Shape(NamedTuple):
    """What values of a shape and their types have in common."""

    sides: Any
    text: str
    elements: int
    side_constants: Any
    elements_constant: Any


def speed_up(core: Any, semantic: Any) -> None:
    """Make ``triton.language.core`` and the class ``TritonSemantic`` faster, for tests.

    Values and types stay the same.
    """
    _describe_shapes_once(core)
    _compare_by_identity_first(core)
    _unwrap_constants_first(core)
    _leave_equal_shapes(semantic)


def _compare_by_identity_first(core: Any) -> None:
    compare, integers = core.dtype.__eq__, frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core.dtype.__eq__ = lambda self, other: self is other or compare(self, other)
    core.dtype.is_int = lambda self: self.name in integers


def _unwrap_constants_first(core: Any) -> None:
    """Tell tensors and constants by their class, before a search for tuples and lists of constants."""
    unwrap_any, tensor, constant = core._unwrap_if_constexpr, core.tensor, core.constexpr

    def unwrap(value: Any) -> Any:
        kind = value.__class__
        if kind is tensor:
            return value
        return value.value if kind is constant else unwrap_any(value)

    core._unwrap_if_constexpr = unwrap


def _leave_equal_shapes(semantic: Any) -> None:
    """Return operands of the same shape at once, where all their sides were compared."""
    broadcast = semantic.broadcast_impl_value

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = broadcast_values


def _describe_shapes_once(core: Any) -> None:
    """Let all values of a shape, and their types, share its description. It is never changed in place."""
    make_type, make_value = core.block_type.__init__, core.tensor.__init__
    shapes: dict[tuple[int, ...] | None, Shape] = {}
    by_identity: dict[int, Shape] = {}
    scalar = Shape((), "", 1, core.tuple([]), core.constexpr(1))

    def sides_of(shape: Any) -> tuple[int, ...] | None:
        """The sides, or None where one of them is no plain integer: ``True`` equals 1, and is written otherwise."""
        if not isinstance(shape, (list, core.tuple)):
            return None  # an error
        sides = tuple(side.value if isinstance(side, core.constexpr) else side for side in shape)
        return sides if all(type(side) is int for side in sides) else None

    def remember(sides: Any, count: int) -> Shape:
        constants = core.tuple([core.constexpr(side) for side in sides])
        shape = Shape(sides, str(sides), count, constants, core.constexpr(count))
        shapes[tuple(sides)] = by_identity[id(sides)] = by_identity[id(constants)] = shape
        return shape

    def initialize_type(self: Any, element_ty: Any, shape: Any) -> None:
        found = by_identity.get(id(shape))
        sides = None if found is not None else sides_of(shape)
        if found is None and (found := shapes.get(sides)) is None:
            make_type(self, element_ty, shape)
            if sides is None:
                return
            found = remember(self.shape, self.numel)
        self.element_ty, self.shape, self.numel = element_ty, found.sides, found.elements
        self.name = f"<{found.text}, {element_ty}>"

    def initialize_value(self: Any, handle: Any, type: Any) -> None:
        shape = by_identity.get(id(type.shape)) if type.is_block() else scalar
        if shape is None:
            make_value(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shape.side_constants, shape.elements_constant

    core.block_type.__init__ = initialize_type
    core.tensor.__init__ = initialize_value
