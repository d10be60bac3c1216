"""Runs of the Triton kernels for tests: with tiles of one's choice, in guarded memory, and in memory past 2^31.

Everything here needs TRITON_INTERPRET=1 and, but for that, no GPU.
"""

import contextlib
import dataclasses
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter
from torch import Tensor

from moe_kernels.experts import Routed, experts, route_rows
from moe_kernels.testing import Case

GUARD = 512  # elements before and after what is allocated; the most that a tile of the interpreter could overrun
# of an int32 nobody wrote: as an index it leads far outside any memory of a test
POISON = 0x7F7F7F7F
MAP_NORESERVE = 0x4000  # of Linux; Python's mmap has no name for it


@contextlib.contextmanager
def overflow_checks() -> Iterator[None]:
    """Let the interpreter raise AssertionError where an int32 sum, difference or product overflows.

    Triton has the checks and its interpreter runs them, but nothing it offers switches them on there. They take a
    quarter of its time.
    """
    builder = triton.runtime.interpreter.interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, debug=True)
    yield
    builder.options = before


def patch_the_language_once() -> None:
    """Let the interpreter put its own operations in Triton's place once per kernel, not at every call of a function.

    It looks through all of the language again each time a kernel calls a function: a fifth of its time, for nothing.
    """
    interpreter: Any = triton.runtime.interpreter
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another release of Triton: as slow as it is
    original = interpreter._patch_lang

    def patch_lang(function: Any) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        # what is in place is no builtin of Triton's any more
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()
        return original(function)

    interpreter._patch_lang = patch_lang


def sum_products_in_one_order() -> None:
    """Let the interpreter sum every element of a product the same way, wherever in its tile the element stands.

    It leaves products to numpy, whose BLAS on some processors sums the rows of one product in different orders; then
    a kernel that promises equal bits would be held to what it has no say in. A GPU's tensor cores treat rows alike.
    """

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        total = np.zeros(d.data.shape, d.data.dtype)
        left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        with np.errstate(invalid="ignore"):  # NaN and infinities are multiplied as they are anywhere
            for k in range(left.shape[-1]):
                total += left[..., :, k, None] * right[..., k, None, :]
            return type(d)(total + d.data, d.dtype.scalar)

    type(triton.runtime.interpreter.interpreter_builder).create_dot = create_dot


@dataclass(frozen=True, slots=True)
class Tiled:
    """The Triton backend with the tiles of that name, whatever the load."""

    tiles: str

    def __call__(
        self,
        x_TD: Tensor,
        token_N: Tensor,
        expert_N: Tensor,
        weight_N: Tensor,
        gate_up_E2FD: Tensor,
        down_EDF: Tensor,
        *,
        fan_out: int | None,
        **options: Any,
    ) -> Tensor:
        sizes = {"num_tokens": x_TD.shape[0], "num_experts": down_EDF.shape[0], "itemsize": x_TD.element_size()}
        routed = route_rows(token_N, expert_N, **sizes, fan_out=fan_out, tiles=self.tiles)
        return experts(x_TD, weight_N, gate_up_E2FD, down_EDF, routed, **options)


def routed_of(case: Case, tiles: str) -> Routed:
    """Return the rows of the case, ordered for the tiles of that name."""
    sizes = {"num_tokens": case.x_TD.shape[0], "num_experts": case.down_EDF.shape[0], "itemsize": case.x_TD.itemsize}
    return route_rows(case.token_N, case.expert_N, **sizes, fan_out=case.fan_out, tiles=tiles)


def pairwise(choices: dict[str, Sequence[Any]], *, apart: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return settings, one value of each choice, so that every two values of two choices meet in one of them.

    Greedy, and the same every time. Choices named in `apart` need not meet each other.
    """
    names = list(choices)
    places = [range(len(choices[name])) for name in names]
    met_by_none = {
        (first, a, second, b)
        for first, second in combinations(range(len(names)), 2)
        if not {names[first], names[second]} <= set(apart)
        for a, b in product(places[first], places[second])
    }
    chosen = []
    while met_by_none:
        best = _grown(names, places, met_by_none)
        met_by_none -= _pairs(best)
        chosen.append({name: choices[name][place] for name, place in zip(names, best, strict=True)})
    return chosen


def _pairs(setting: Sequence[int]) -> set[tuple[int, int, int, int]]:
    return {(i, setting[i], j, setting[j]) for i, j in combinations(range(len(setting)), 2)}


def _grown(names: list[str], places: list[range], met_by_none: set[tuple[int, int, int, int]]) -> list[int]:
    """Return a setting that holds the first pair not met, each further value chosen to meet most others."""
    first, a, second, b = min(met_by_none)
    known = {first: a, second: b}
    for i in sorted(range(len(names)), key=lambda i: -len(places[i])):
        if i in known:
            continue

        def news(value: int, i: int = i) -> int:
            pairs = [(i, value, j, known[j]) if i < j else (j, known[j], i, value) for j in known]
            return sum(pair in met_by_none for pair in pairs)

        # a tie goes to the next value each time, so that what need not meet does not always stand at its first
        shift = len(met_by_none)
        known[i] = max(places[i], key=lambda value: (news(value), (value + shift) % len(places[i])))
    return [known[i] for i in range(len(names))]


def embedded(tensor: Tensor, *, shift: int = 0) -> Tensor:
    """Return a view of the same numbers inside a larger tensor that holds NaN everywhere else.

    Rows and columns lie 16 bytes and more apart, so that descriptors can still be made of it; with `shift` the view
    begins so many elements later.
    """
    room = 16
    outer = torch.full([size + 2 * room for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = outer[tuple(slice(room + (shift if d == tensor.ndim - 1 else 0), None) for d in range(tensor.ndim))]
    view = view[tuple(slice(size) for size in tensor.shape)]
    return view.copy_(tensor)


@contextlib.contextmanager
def allocated_by(allocate: Callable[[torch.Size, torch.dtype], Tensor]) -> Iterator[None]:
    """Let torch.empty, torch.empty_like and Tensor.new_empty hand out what `allocate` returns."""

    def size(shape: tuple[Any, ...]) -> torch.Size:
        return torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)

    def empty(*shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return allocate(size(shape), dtype or torch.get_default_dtype())

    def empty_like(like: Tensor, **_: Any) -> Tensor:
        return allocate(like.shape, like.dtype)

    def new_empty(like: Tensor, *shape: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return allocate(size(shape), dtype or like.dtype)

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
    ):
        yield


@contextlib.contextmanager
def guarded_memory() -> Iterator[None]:
    """Put poison into all memory that is allocated, and guards around it that are checked at the end.

    Raises:
        AssertionError: something was written outside what was allocated.
    """
    guarded: list[tuple[Tensor, int]] = []

    def allocate(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        poison = float("nan") if dtype.is_floating_point else POISON
        outer = torch.full((shape.numel() + 2 * GUARD,), poison, dtype=dtype)
        guarded.append((outer, shape.numel()))
        return outer[GUARD : GUARD + shape.numel()].view(shape)

    with allocated_by(allocate):
        yield
    assert guarded
    for outer, size in guarded:
        guards = torch.cat((outer[:GUARD], outer[GUARD + size :]))
        is_whole = guards.isnan() if outer.dtype.is_floating_point else guards == POISON
        assert is_whole.all(), f"memory of {size} elements, {outer.dtype}, was overrun"


def reserved(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros of which only what is touched takes memory, however many there are."""
    size = torch.Size(shape).numel()
    memory = mmap.mmap(-1, max(size, 1) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype)[:size].view(torch.Size(shape))


def spread(tensor: Tensor, *strides: int) -> Tensor:
    """Return the same numbers in reserved memory, with these strides in elements."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    return reserved([last + 1], tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)
