"""The PTX instructions of arithmetic, as C++. The sections are those of NVIDIA's "PTX ISA", version 9."""

from .operands import NARROW, READ, TYPES, WIDTHS, Operands, Site, UnknownInstructionError, instruction, only, put

SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
UNDEFINED = {"div": "divided", "rem": "remainder_of"}  # of integers: C++ leaves some results open


@instruction("bfe")
def bit_field(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1, bfe: so many bits from a position."""
    only(parts, "u32")
    a, position, length = (operands.bits(k, "u32") for k in (1, 2, 3))
    return f"{operands.register(0)} = bit_field({a}, {position}, {length});"


@instruction("bfi")
def insert_bits(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1, bfi: the second number, with so many of the lowest bits of the first at a position."""
    only(parts, "b32", "b64")
    kind = parts[0]
    a, b, position, length = (operands.bits(k, kind if k < 3 else "u32") for k in (1, 2, 3, 4))
    return f"{operands.register(0)} = with_field<{TYPES[kind]}>({a}, {b}, {position}, {length});"


@instruction("prmt")
def permute(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, prmt: picks four of eight bytes. The highest bit of a selector repeats the byte's sign instead."""
    only(parts, "b32")
    a, b, selectors = (operands.bits(k, "b32") for k in (1, 2, 3))
    return f"{operands.register(0)} = permuted({a}, {b}, {selectors});"


@instruction("add", "sub", "mul", "div", "rem", "min", "max")
def arithmetic(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1 for integers, 9.7.3 for floats, 9.7.4 for 16 bits. min and max give the other number for a nan."""
    what, *modes, kind = [name.split(".")[0], *parts]
    if kind.endswith("x2"):
        only(modes, "rn")
        return _packed(what, kind[:-2], operands)
    if what in ("min", "max"):
        only(modes)
        order = "least" if what == "min" else "most"
        return put(operands, f"{order}({operands.number(1, kind)}, {operands.number(2, kind)})", kind)
    return (_of_floats if kind in READ else _of_integers)(what, modes, kind, operands)


def _packed(what: str, kind: str, operands: Operands) -> str:
    """Two numbers in one register, the higher half first."""
    halves = []
    for shift in (16, 0):
        a, b = (f"{READ[kind]}((u16)({operands.bits(k, 'b32')} >> {shift}))" for k in (1, 2))
        halves.append(f"(u32){NARROW[kind]}({a} {SIGNS[what]} {b})")
    return f"{operands.register(0)} = {halves[0]} << 16 | {halves[1]};"


def _of_integers(what: str, modes: list[str], kind: str, operands: Operands) -> str:
    """`.lo` is the lower half of a product, `.hi` the higher, `.wide` all of it."""
    only(modes, *(("lo", "hi", "wide") if what == "mul" else ()))
    a, b, of = operands.number(1, kind), operands.number(2, kind), TYPES[kind]
    if "hi" in modes:
        return f"{operands.register(0)} = product_high<{of}>({a}, {b});"
    if what in UNDEFINED:
        return f"{operands.register(0)} = {UNDEFINED[what]}<{of}>({a}, {b});"
    wide = f"{kind[0]}{2 * WIDTHS[kind]}" if "wide" in modes else f"u{WIDTHS[kind]}"
    return f"{operands.register(0)} = ({wide}){a} {SIGNS[what]} ({wide}){b};"


def _of_floats(what: str, modes: list[str], kind: str, operands: Operands) -> str:
    """div.full.f32 is within 2 ulp; `.rn` is exact."""
    only(modes, "rn", *(("full",) if what == "div" else ()))
    exact = f"{operands.number(1, kind)} {SIGNS[what]} {operands.number(2, kind)}"
    return put(operands, f"near({exact}, 2)" if "full" in modes else exact, kind)


@instruction("fma")
def fused(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.3, fma: a·b + c, rounded once."""
    *modes, kind = parts
    only([*modes, kind], "rn", "f32", "f64")
    return put(operands, f"std::fma({', '.join(operands.number(k, kind) for k in (1, 2, 3))})", kind)


@instruction("rcp")
def reciprocal(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.3, rcp. `.rn` is exact."""
    *modes, kind = parts
    if modes != ["rn"]:
        raise UnknownInstructionError(".".join(modes))
    return put(operands, f"1 / {operands.number(1, kind)}", kind)


@instruction("mad")
def multiply_add(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1, mad: a·b + c. `.lo` keeps the lower half, `.wide` all of the product."""
    how, kind = parts
    wide = f"{kind[0]}{2 * WIDTHS[kind]}" if {"lo": False, "wide": True}[how] else f"u{WIDTHS[kind]}"
    a, b, c = operands.number(1, kind), operands.number(2, kind), operands.bits(3, f"u{wide[1:]}")
    return f"{operands.register(0)} = ({wide})(({wide}){a} * ({wide}){b}) + ({wide}){c};"


@instruction("neg", "abs")
def sign(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1 and 9.7.3."""
    kind = parts[0]
    a = operands.number(1, kind)
    if name.startswith("neg"):
        return put(operands, f"-{a}", kind)
    return put(operands, f"std::fabs({a})" if kind in READ else f"{a} < 0 ? -{a} : {a}", kind)


@instruction("sqrt")
def root(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.3, sqrt. `.rn` is exact. `.approx` is within 2⁻²³ of it, relatively: 1 ulp or 2. `.ftz` takes subnormal
    numbers, and gives them, as zeros."""
    *modes, kind = parts
    a = operands.number(1, kind)
    if modes == ["rn"]:
        return put(operands, f"std::sqrt({a})", kind)
    if modes != ["approx", "ftz"]:
        raise UnknownInstructionError(name)
    return put(operands, f"flushed(near(std::sqrt(flushed({a})), 1))", kind)
