"""Sixteen 32-bit lanes as one numba value: what LLVM does not find by itself in a loop.

LLVM does not vectorise short loops over memory that may alias, so the kernels say what they mean:
`lanes` is LLVM's <16 x i32>, legal on every target (one register of AVX-512, two of AVX2, four of
NEON). Floats are carried as bit patterns and seen as numbers only by the functions whose names
say so. No fast-math flag is ever set: nothing is fused or reassociated.

Arrays of weights: float32; uint16 holds the bits of bfloat16, int16 the bits of float16.
"""

import operator
from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

from lorand.philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1

WIDTH: Final = 16
STREAM_ALIGN: Final = 64

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LANES = ir.VectorType(_I32, WIDTH)
_WIDE = ir.VectorType(_I64, WIDTH)
_HALVES = ir.VectorType(_I16, WIDTH)
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_DOUBLES = ir.VectorType(ir.DoubleType(), WIDTH)
_FLOAT16S = ir.VectorType(ir.HalfType(), WIDTH)

Codegen = Callable[[Any, Any, Any, Any], Any]


class LanesType(types.Type):
    """The numba type of sixteen 32-bit lanes."""

    def __init__(self) -> None:
        """There is one such type."""
        super().__init__(name="Lanes")


lanes: Final = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _LANES)


# ------------------------------------------------------------- constants and uniform values


def _all(value: int, kind: Any = _LANES) -> Any:
    return ir.Constant(kind, [value] * WIDTH)


def _order(positions: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(positions)), positions)


def _numbers() -> Any:
    return ir.Constant(_LANES, list(range(WIDTH)))


def _uniform(builder: Any, scalar: Any) -> Any:
    none = ir.Constant(_LANES, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(none, scalar, _I32(0)), none, _all(0))


@intrinsic
def splat(_context: Any, scalar: Any) -> Any:
    """Return lanes that all hold a uint32."""

    def codegen(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _uniform(builder, arguments[0])

    return lanes(types.uint32), codegen


@intrinsic
def numbered(_context: Any) -> Any:
    """Return lanes that hold their own numbers 0 … 15."""

    def codegen(*_: Any) -> Any:
        return _numbers()

    return lanes(), codegen


# ------------------------------------------------------------- arithmetic


def _binary(name: str, kind: Any = _LANES) -> Codegen:
    """An operation of two lanes, seen as kind."""

    def codegen(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        left, right = (builder.bitcast(a, kind) for a in arguments)
        return builder.bitcast(getattr(builder, name)(left, right), _LANES)

    return codegen


for _symbol, _name in (
    (operator.xor, "xor"),
    (operator.and_, "and_"),
    (operator.or_, "or_"),
    (operator.add, "add"),
    (operator.sub, "sub"),
    (operator.lshift, "shl"),
    (operator.rshift, "lshr"),
):
    _cases = {"cases": [signature(lanes, lanes, lanes)]}
    infer_global(_symbol)(type(f"Lanes_{_name}", (ConcreteTemplate,), _cases))
    lower_builtin(_symbol, lanes, lanes)(_binary(_name))


@intrinsic
def add_floats(_context: Any, _left: Any, _right: Any) -> Any:
    """Return the sums of float32 bit patterns."""
    return lanes(lanes, lanes), _binary("fadd", _FLOATS)


@intrinsic
def scale(_context: Any, _value: Any, _factor: Any) -> Any:
    """Return signed integers, rounded to float32, times a float32 factor."""

    def codegen(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value = builder.sitofp(arguments[0], _FLOATS)
        factor = builder.bitcast(arguments[1], _I32)
        product = builder.fmul(value, builder.bitcast(_uniform(builder, factor), _FLOATS))
        return builder.bitcast(product, _LANES)

    return lanes(lanes, types.float32), codegen


@intrinsic
def philox_blocks(_context: Any, _first: Any, _c1: Any, _c2: Any, _k0: Any, _k1: Any) -> Any:
    """Return the four output words of Philox4x32-10 for counters (first … first + 15, c1, c2, 0).

    Words are kept in 64-bit lanes: a product's low half may then drag its high half along, since
    the next multiplication reads 32 bits and the end cuts the rest off.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, c1, c2, k0, k1 = arguments
        start = builder.add(_uniform(builder, first), _numbers())
        x = [builder.zext(v, _WIDE) for v in (start, *(_uniform(builder, c) for c in (c1, c2)))]
        x.append(_all(0, _WIDE))
        low, half = _all(0xFFFFFFFF, _WIDE), _all(32, _WIDE)

        def key(k: Any, weyl: int, number: int) -> Any:
            now = builder.add(k, _I32(weyl * number & 0xFFFFFFFF))
            return builder.zext(_uniform(builder, now), _WIDE)

        for number in range(ROUNDS):
            p0 = builder.mul(builder.and_(x[0], low), _all(MULTIPLIER_0, _WIDE))
            p1 = builder.mul(builder.and_(x[2], low), _all(MULTIPLIER_1, _WIDE))
            first = builder.xor(x[1], key(k0, WEYL_0, number))
            third = builder.xor(x[3], key(k1, WEYL_1, number))
            x = [
                builder.xor(builder.lshr(p1, half), first),
                p1,
                builder.xor(builder.lshr(p0, half), third),
                p0,
            ]
        words = [builder.trunc(word, _LANES) for word in x]
        return context.make_tuple(builder, signature.return_type, words)

    word = types.uint32
    return types.UniTuple(lanes, 4)(word, word, word, word, word), codegen


# ------------------------------------------------------------- moving lanes


def _has_permute(context: Any) -> bool:
    """Whether one instruction permutes sixteen lanes on the processor that code is made for."""
    return "+avx512f" in context.codegen().magic_tuple()[2].split(",")


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    kind = ir.FunctionType(_LANES, [_LANES] * len(arguments))
    return builder.call(builder.module.declare_intrinsic(name, (), kind), arguments)


def _permute_xor(context: Any, builder: Any, value: Any, low: Any) -> Any:
    """value[i xor low] in lane i; of a uniform low only the last four bits count."""
    if _has_permute(context):
        places = builder.xor(_uniform(builder, low), _numbers())
        return _call(builder, "llvm.x86.avx512.permvar.si.512", value, places)
    for bit in (1, 2, 4, 8):  # a swap of neighbours for every bit of low that is set
        swapped = builder.shuffle_vector(value, value, _order([n ^ bit for n in range(WIDTH)]))
        wanted = builder.icmp_unsigned("!=", builder.and_(low, _I32(bit)), _I32(0))
        value = builder.select(wanted, swapped, value)
    return value


def _split_xor(context: Any, builder: Any, first: Any, second: Any, low: Any) -> list[Any]:
    """The even and the odd places of first ‖ second, each read at its place xor low (0 … 31)."""
    numbers = list(range(0, 2 * WIDTH, 2))
    if _has_permute(context):
        even = builder.xor(_uniform(builder, low), _order(numbers))
        name = "llvm.x86.avx512.vpermi2var.d.512"
        return [_call(builder, name, first, p, second) for p in (even, builder.xor(even, _all(1)))]
    first, second = (_permute_xor(context, builder, value, low) for value in (first, second))
    swap = builder.icmp_unsigned("!=", builder.and_(low, _I32(WIDTH)), _I32(0))
    pair = [builder.select(swap, a, b) for a, b in ((second, first), (first, second))]
    return [builder.shuffle_vector(*pair, _order([n + odd for n in numbers])) for odd in (0, 1)]


@intrinsic
def permute_xor(_context: Any, _value: Any, _low: Any) -> Any:
    """Return value[i xor low] in lane i, low in 0 … 15 and the same for all lanes."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _permute_xor(context, builder, *arguments)

    return lanes(lanes, types.uint32), codegen


@intrinsic
def look_up(_context: Any, _table: Any, _places: Any) -> Any:
    """Return table[places[i] mod 16] in lane i, where table[n] is linear in the bits of n.

    Linear: table[n] = table[0] + Σ (table[bit] − table[0]) over the bits of n.
    """

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        table, places = arguments
        if _has_permute(context):
            return _call(builder, "llvm.x86.avx512.permvar.si.512", table, places)
        start = builder.extract_element(table, _I32(0))
        total = _uniform(builder, start)
        for bit in (1, 2, 4, 8):
            step = builder.sub(builder.extract_element(table, _I32(bit)), start)
            chosen = builder.icmp_unsigned("!=", builder.and_(places, _all(bit)), _all(0))
            term = builder.select(chosen, _uniform(builder, step), _all(0))
            total = builder.add(total, term)
        return total

    return lanes(lanes, lanes), codegen


@intrinsic
def interleave(_context: Any, _a: Any, _b: Any) -> Any:
    """Return a0 b0 a1 b1 … as two lanes."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        places = [half + word for half in range(WIDTH) for word in (0, WIDTH)]
        parts = [
            builder.shuffle_vector(*arguments, _order(places[i : i + WIDTH])) for i in (0, WIDTH)
        ]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(lanes, 2)(lanes, lanes), codegen


# ------------------------------------------------------------- memory


def _pointer(context: Any, builder: Any, array_type: Any, kind: Any, *place: Any) -> Any:
    array, index = place
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


@intrinsic
def pointer_to(_context: Any, _address: Any) -> Any:
    """Return an address as the pointer that `numba.carray` takes."""

    def codegen(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def take(_context: Any, _address: Any) -> Any:
    """Return the int64 at an address and add one to it, atomically."""

    def codegen(_: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "seq_cst")

    return types.int64(types.int64), codegen


def _read(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    def read(of: Any) -> Any:
        pointer = _pointer(context, builder, kind, of, array, index)
        return builder.load(pointer, align=kind.dtype.bitwidth // 8)

    if kind.dtype == types.uint16:
        return builder.shl(builder.zext(read(_HALVES), _LANES), _all(16))
    if kind.dtype == types.int16:
        return builder.bitcast(builder.fpext(read(_FLOAT16S), _FLOATS), _LANES)
    return read(_LANES)


def _narrow(builder: Any, kind: Any, value: Any) -> Any:
    """Lanes as they lie in an array of this kind: 16-bit floats are rounded to nearest even."""
    if kind.dtype == types.uint16:
        upper = builder.lshr(_round_to_bfloat16(builder, value), _all(16))
        return builder.trunc(upper, _HALVES)
    if kind.dtype == types.int16:
        return builder.fptrunc(builder.bitcast(value, _FLOATS), _FLOAT16S)
    return value


@intrinsic
def load(_context: Any, array: Any, _index: Any) -> Any:
    """Return array[index : index + 16]; 16-bit weights widened to the bits of float32."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _read(context, builder, signature.args[0], *arguments)

    return lanes(array, types.int64), codegen


@intrinsic
def store(_context: Any, array: Any, _index: Any, _value: Any) -> Any:
    """Write array[index : index + 16]; floats are rounded to nearest even into 16-bit weights."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _narrow(builder, signature.args[0], arguments[2])
        pointer = _pointer(context, builder, signature.args[0], value.type, *arguments[:2])
        builder.store(value, pointer, align=signature.args[0].dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, lanes), codegen


@intrinsic
def load_two(_context: Any, array: Any, _index: Any) -> Any:
    """Return 32 weights from index on as two lanes of float32, in the dtype's own order.

    bfloat16: the even ones, then the odd ones, which needs no instruction that moves lanes.
    Others: the first sixteen, then the second.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        if kind.dtype == types.uint16:
            both = builder.load(_pointer(context, builder, kind, _LANES, *arguments), align=2)
            parts = [builder.shl(both, _all(16)), builder.and_(both, _all(0xFFFF0000))]
        else:
            index = arguments[1]
            indices = (index, builder.add(index, _I64(WIDTH)))
            parts = [_read(context, builder, kind, arguments[0], i) for i in indices]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(lanes, 2)(array, types.int64), codegen


def _writer(stream: bool) -> Any:
    """Write what `load_two` would return; past the cache where `stream`."""

    @intrinsic
    def write(_context: Any, array: Any, _index: Any, _first: Any, _second: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind, (target, index, *values) = signature.args[0], arguments
            if kind.dtype == types.uint16:
                even, odd = (_round_to_bfloat16(builder, value) for value in values)
                odd = builder.and_(odd, _all(0xFFFF0000))
                values = [builder.or_(builder.lshr(even, _all(16)), odd)]
            else:
                values = [_narrow(builder, kind, value) for value in values]
            size = kind.dtype.bitwidth // 8
            align = 2 * WIDTH * size // len(values) if stream else size  # a whole store's bytes
            for number, value in enumerate(values):
                place = builder.add(index, _I64(number * WIDTH))
                pointer = _pointer(context, builder, kind, value.type, target, place)
                written = builder.store(value, pointer, align=align)
                if stream:
                    mark = builder.module.add_metadata([_I32(1)])
                    written.set_metadata("nontemporal", mark)
            return context.get_dummy_value()

        return types.void(array, types.int64, lanes, lanes), codegen

    return write


store_two: Final = _writer(stream=False)
stream_two: Final = _writer(stream=True)
"""As store_two, past the cache; the array starts on a multiple of STREAM_ALIGN bytes."""


@intrinsic
def load_moves(_context: Any, weights: Any, _table: Any, _index: Any, _low: Any) -> Any:
    """Return table[(index + e) xor low], e = 0 … 31, as two lanes in the order of the weights.

    index is a multiple of 32; low is in 0 … 31.
    """

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, table, index, low = arguments
        pair = [
            _read(context, builder, signature.args[1], table, builder.add(index, _I64(n)))
            for n in (0, WIDTH)
        ]
        if signature.args[0].dtype == types.uint16:
            parts = _split_xor(context, builder, pair[0], pair[1], low)
        else:
            swap = builder.icmp_unsigned("!=", builder.and_(low, _I32(WIDTH)), _I32(0))
            pair = [builder.select(swap, a, b) for a, b in (pair[::-1], pair)]
            parts = [_permute_xor(context, builder, value, low) for value in pair]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(lanes, 2)(weights, _table, types.int64, types.uint32), codegen


@intrinsic
def fence(_context: Any) -> Any:
    """Make streamed stores visible to other threads."""

    def codegen(context: Any, builder: Any, *_: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


def _round_to_bfloat16(builder: Any, value: Any) -> Any:
    """Round the upper half by integers: the processor's own instruction drops subnormals.

    Half a unit is added; a tie, whose lower half is then zero, gets its last bit cleared. A NaN
    stays one, since sums with a bfloat16 NaN have a lower half of zero.
    """
    up = builder.add(value, _all(0x8000))
    tie = builder.icmp_unsigned("==", builder.and_(up, _all(0xFFFF)), _all(0))
    return builder.select(tie, builder.and_(up, _all(0xFFFEFFFF)), up)


@intrinsic
def prefetch_two(_context: Any, array: Any, _index: Any) -> Any:
    """Ask for the cache lines of 32 elements from index on, which may lie outside the array."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind, (array, index) = signature.args[0], arguments
        byte = ir.IntType(8).as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", (byte,), ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        )
        line = 64 // (kind.dtype.bitwidth // 8)
        for first in range(0, 2 * WIDTH, line):
            place = builder.add(index, _I64(first))
            pointer = _pointer(context, builder, kind, ir.IntType(8), array, place)
            builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])  # read, keep, data
        return context.get_dummy_value()

    return types.void(array, types.int64), codegen


@intrinsic
def accumulate(_context: Any, sums: Any, _index: Any, _value: Any, _factor: Any) -> Any:
    """Add factor times float32 lanes to the float64 sums[index : index + 16]."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array, index, value, factor = arguments
        pointer = _pointer(context, builder, signature.args[0], _DOUBLES, array, index)
        none = ir.Constant(_DOUBLES, ir.Undefined)
        factors = builder.shuffle_vector(
            builder.insert_element(none, factor, _I32(0)), none, _all(0)
        )
        wide = builder.fmul(builder.fpext(builder.bitcast(value, _FLOATS), _DOUBLES), factors)
        builder.store(builder.fadd(builder.load(pointer, align=8), wide), pointer, align=8)
        return context.get_dummy_value()

    return types.void(sums, types.int64, lanes, types.float64), codegen
