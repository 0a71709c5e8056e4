"""What each PTX instruction does, as C++: control, what threads do together, moving, converting, comparing, and bits.
Memory and arithmetic have files of their own. The sections are those of NVIDIA's "PTX ISA", version 9."""

from . import arithmetic, memory  # noqa: F401  (they enter what they know)
from .operands import (
    NARROW,
    READ,
    TYPES,
    WIDTHS,
    Operands,
    Site,
    UnknownInstructionError,
    bits_of,
    emit,
    instruction,
    only,
    put,
)

__all__ = ["TYPES", "Operands", "UnknownInstructionError", "emit"]

COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
COMBINE = {"and": "&&", "or": "||", "xor": "!="}
ROUND = {"rzi": "std::trunc", "rni": "std::nearbyint", "rmi": "std::floor", "rpi": "std::ceil"}


@instruction("ret", "exit")
def leave(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.12: ret ends the function, which ends the thread if it is the kernel. exit ends the thread."""
    only(parts, "uni")
    return "return;" if name.startswith("ret") else "end_thread(me);"


@instruction("bra")
def branch(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.12, bra. `.uni` says that all threads of a warp take it."""
    only(parts, "uni")
    return f"goto {operands[0].replace('$', '')};"


@instruction("bar")
def barrier(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.13, bar.sync: waits for all threads of the program, and orders their accesses. bar.warp.sync: the same for
    the lanes of a mask."""
    only(parts, "warp", "sync")
    if parts == ["warp", "sync"]:
        return f"gather(me, {operands.bits(0, 'b32')}, {site(name)});"
    if operands.texts != ["0"]:
        raise UnknownInstructionError("a barrier of its own")
    return f"barrier(me, {site(name)});"


@instruction("shfl")
def shuffle(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, shfl.sync.bfly: the value of the lane whose number differs in the given bits, among the lanes of a mask.
    It orders no accesses. A predicate beside the destination tells that there is such a lane."""
    only(parts, "sync", "bfly", "b32")
    value, mask, clamp, members = (operands.bits(k, "b32") for k in (1, 2, 3, 4))
    to, *there = operands.texts[0].replace("%", "").split("|")
    told = "".join(f" {name} = true;" for name in there)
    return f"{to} = exchanged(me, {value}, {mask}, {clamp}, {members}, {site(name)});{told}"


@instruction("redux")
def reduce_warp(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.13, redux.sync: the least or the largest integer of the lanes of a mask."""
    only(parts, "sync", "min", "max", "s32", "u32")
    kind = {"min": "LEAST", "max": "MOST"}[parts[1]] + ("_UNSIGNED" if parts[2] == "u32" else "")
    value, members = operands.bits(1, parts[2]), operands.bits(2, "b32")
    return f"{operands.register(0)} = meet(me, {kind}, {value}, 0, {site(name)}, {members});"


@instruction("mov")
def move(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, mov: copies. {a, b} is a register's lower and higher half."""
    kind = parts[0]
    if operands[0].startswith("{"):
        into = operands.vector(0)
        width = WIDTHS[kind] // len(into)
        written = " ".join(f"{of[1:]} = (u{width})(whole >> {k * width});" for k, of in enumerate(into) if of != "_")
        return f"{TYPES[kind]} whole = {operands.bits(1, kind)}; {written}"
    if operands[1].startswith("{"):
        of = operands.vector(1)
        width = WIDTHS[kind] // len(of)
        halves = [f"(u64)(u{width})({bits_of(part, f'u{width}')}) << {k * width}" for k, part in enumerate(of)]
        return f"{operands.register(0)} = {' | '.join(halves)};"
    return f"{operands.register(0)} = ({TYPES[kind]})({operands.bits(1, kind)});"


@instruction("cvt")
def convert(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, cvt. `.rn` rounds to nearest, ties to even. `.rzi` and the like give an integer: toward zero, to nearest,
    down or up. An integer is brought within its type's range. `x2` makes two: the first source is the higher half."""
    *modes, to, source = parts
    only(modes, "rn", *ROUND)
    if to in ("f16x2", "bf16x2"):
        only([*modes, source], "rn", "f32")
        high, low = (f"(u32){NARROW[to[:-2]]}({operands.number(k, source)})" for k in (1, 2))
        return f"{operands.register(0)} = {high} << 16 | {low};"
    if to in NARROW and source != "f32":
        raise UnknownInstructionError("rounded to a float before")
    value = operands.number(1, source)
    whole = [ROUND[mode] for mode in modes if mode in ROUND]
    if source in READ and whole:
        value = f"{whole[0]}({value})"
    elif whole or (source in READ and to not in READ):
        raise UnknownInstructionError("how it is rounded")
    if source in READ and to not in READ:
        return f"{operands.register(0)} = truncated<{TYPES[to]}>({value});"
    return put(operands, value if to in READ else f"({TYPES[to]}){value}", to)


@instruction("selp")
def select(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.6, selp: a if p, else b."""
    kind = parts[0]
    return f"{operands.register(0)} = {operands.bits(3, 'pred')} ? {operands.bits(1, kind)} : {operands.bits(2, kind)};"


@instruction("setp")
def compare(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.6, setp. With nan, the plain comparisons are false and those that end in u are true. `num` is neither nan,
    `nan` either. p|q: q gets the opposite, and both are combined with a third operand. `x2` compares both halves."""
    how, *combined, kind = parts
    targets = [of.strip().removeprefix("%") for of in operands[0].split("|")]
    if kind.endswith("x2"):
        only(combined)
        read, values = READ[kind[:-2]], [operands.bits(k, kind) for k in (1, 2)]
        halves = [[f"{read}((u16)({of} >> {shift}))" for of in values] for shift in (0, 16)]
        return " ".join(f"{p} = {_compared(how, *of)};" for p, of in zip(targets, halves, strict=True))
    only(combined, *COMBINE)
    result = _compared(how, operands.number(1, kind), operands.number(2, kind), kind)
    results = [f"{negated}{result}" for negated in ("", "!")[: len(targets)]]
    if combined:
        third = operands[3]
        third = f"!{bits_of(third[1:], 'pred')}" if third.startswith("!") else bits_of(third, "pred")
        results = [f"{of} {COMBINE[combined[0]]} {third}" for of in results]
    elif len(operands) != 3:
        raise UnknownInstructionError("another operand")
    temporary = " ".join(f"bool to{k} = {of};" for k, of in enumerate(results))
    return f"{temporary} {' '.join(f'{p} = to{k};' for k, p in enumerate(targets) if p != '_')}"


def _compared(how: str, a: str, b: str, kind: str = "f32") -> str:
    number, floats = f"({a} == {a} && {b} == {b})", kind in READ
    if floats and how in ("num", "nan"):
        return number if how == "num" else f"(!{number})"
    if floats and how.endswith("u"):
        return f"(!{number} || {a} {COMPARE[how[:-1]]} {b})"
    if floats and how == "ne":
        return f"({number} && {a} != {b})"
    return f"({a} {(UNSIGNED | COMPARE if kind[0] == 'u' else COMPARE)[how]} {b})"


@instruction("and", "or", "xor")
def logic(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.8."""
    sign = {"and": "&", "or": "|", "xor": "^"}[name.split(".")[0]]
    kind = parts[0]
    return f"{operands.register(0)} = {operands.bits(1, kind)} {sign} {operands.bits(2, kind)};"


@instruction("not")
def complement(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.8."""
    return f"{operands.register(0)} = {'!' if parts[0] == 'pred' else '~'}{operands.bits(1, parts[0])};"


@instruction("shl", "shr")
def shift(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.8. By the width or more: all bits leave. shr of a signed number repeats its sign."""
    how, kind = ("shifted_left" if name.startswith("shl") else "shifted_right"), parts[0]
    return f"{operands.register(0)} = {how}<{TYPES[kind]}>({operands.bits(1, kind)}, {operands.bits(2, 'u32')});"
