"""exp, log and what is made of them, for Numba loops that should run on vectors.

Numba's own are calls to a scalar library, which keep a loop from running on vectors. These are short
series, in the float type of their argument, within a few roundings where nothing else is said.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from pliant.kernels._jit import jit_exact


def _constant(single: float, double: float | None = None) -> Any:
    """A function of x that is the same number in the type of x: a literal would make Numba compute in float64."""
    double = single if double is None else double

    def typed(typing: Any, x: Any) -> Any:
        value = single if x == types.float32 else double
        return x(x), lambda context, builder, _, given: ir.Constant(given[0].type, value)

    return intrinsic(inspect.unwrap(typed))


def _series(single: Sequence[float], double: Sequence[float]) -> Any:
    """A polynomial in x, coefficients from the highest power down, written out without a loop."""

    def typed(typing: Any, x: Any) -> Any:
        first, *rest = single if x == types.float32 else double

        def code(context: Any, builder: Any, _: Any, given: Any) -> Any:
            (at,) = given
            total = ir.Constant(at.type, first)
            for value in rest:
                total = builder.fadd(builder.fmul(total, at), ir.Constant(at.type, value))
            return total

        return x(x), code

    return intrinsic(inspect.unwrap(typed))


def _nearest_whole(typing: Any, x: Any) -> Any:
    def code(context: Any, builder: Any, _: Any, given: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [given[0].type]), given)

    return x(x), code


def _two_to_the(typing: Any, n: Any) -> Any:
    """2^n by its bits, for a whole n that is held as a float."""
    bits, digits, bias = (32, 23, 127) if n == types.float32 else (64, 52, 1023)

    def code(context: Any, builder: Any, _: Any, given: Any) -> Any:
        integer = ir.IntType(bits)
        shifted = builder.add(builder.fptosi(given[0], integer), integer(bias))
        return builder.bitcast(builder.shl(shifted, integer(digits)), given[0].type)

    return n(n), code


def _from_bits(typing: Any, bits: Any) -> Any:
    """The float32 that has these bits, an int32."""
    return types.float32(bits), lambda context, builder, _, given: builder.bitcast(given[0], ir.FloatType())


float_of_bits: Any = intrinsic(inspect.unwrap(_from_bits))
rint: Any = intrinsic(inspect.unwrap(_nearest_whole))
power_of_two: Any = intrinsic(inspect.unwrap(_two_to_the))
zero, half, one, two = (_constant(value) for value in (0.0, 0.5, 1.0, 2.0))
_limit = _constant(87.0, 708.0)
_log2e = _constant(1 / math.log(2))
# log(2) in two parts, of which the first has few digits, so that whole multiples of it are exact.
_log2_high, _log2_low = _constant(0.693359375), _constant(-2.121944400546905827679e-4)
# (exp(r) - 1) / r on ±log(2)/2; the first terms left out are 5e-9 and 4e-18 of the sum.
_rise = _series(*([1 / math.factorial(n + 1) for n in range(last, -1, -1)] for last in (6, 12)))
# atanh(s) / s in s² on [0, 1/3]; the first terms left out are 1e-8 and 2e-17 of the sum.
_area = _series(*([1 / (2 * k + 1) for k in range(last, -1, -1)] for last in (6, 15)))


@jit_exact
def exp(x):  # type: ignore[no-untyped-def]
    """exp(x); 0 below -87 (float64: -708), and what it is at 87 (708) above that."""
    limit = _limit(x)
    y = -limit if x < -limit else x
    y = limit if y > limit else y
    n = rint(y * _log2e(x))
    r = (y - n * _log2_high(x)) - n * _log2_low(x)
    return zero(x) if x < -limit else (r * _rise(r) + one(x)) * power_of_two(n)


@jit_exact
def tanh(x):  # type: ignore[no-untyped-def]
    """tanh(x), with small x as exact as large ones: from exp(2x) - 1, in which the 1 is never added."""
    limit = _limit(x)
    y = two(x) * x
    y = -limit if y < -limit else y
    y = limit if y > limit else y
    n = rint(y * _log2e(x))
    r = (y - n * _log2_high(x)) - n * _log2_low(x)
    scale = power_of_two(n)
    e = scale * (r * _rise(r)) + (scale - one(x))
    return e / (e + two(x))


@jit_exact
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x))."""
    return one(x) / (one(x) + exp(-x))


@jit_exact
def log1p_unit(u):  # type: ignore[no-untyped-def]
    """log(1 + u) for u from 0 to 1: twice the area tangent of u / (2 + u)."""
    s = u / (two(u) + u)
    return two(u) * s * _area(s * s)
