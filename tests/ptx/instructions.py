"""What each PTX instruction does, as C++. The sections are those of NVIDIA's "PTX ISA", version 9.

Registers are variables that hold bits: a float32 lies in a u32. `F`, `D`, `H` and `BF` read them as numbers, `bits`
writes them (arithmetic.h). `me` is the thread, `machine` all of them (machine.h).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

TYPES = {
    "pred": "bool",
    **{f"{kind}{width}": f"u{width}" for kind in "bu" for width in (8, 16, 32, 64)},
    **{f"s{width}": f"s{width}" for width in (8, 16, 32, 64)},
    "f16": "u16", "bf16": "u16", "f32": "u32", "f64": "u64", "f16x2": "u32", "bf16x2": "u32",
}  # fmt: skip
WIDTHS = {kind: 32 if kind.endswith("x2") else int(re.sub(r"\D", "", kind) or 1) for kind in TYPES}
READ = {"f32": "F", "f64": "D", "f16": "H", "bf16": "BF"}  # bits to a number
NARROW = {"f16": "to_half", "bf16": "to_bfloat"}  # a float to bits
SPECIAL = {
    "%tid.x": "me.place", "%ctaid.x": "me.program->number", "%nctaid.x": "machine.programs",
    "%ntid.x": "machine.threads", "%laneid": "(me.place % 32)",
}  # fmt: skip
SPECIAL |= {f"%{name}.{axis}": "0" for name in ("tid", "ctaid") for axis in "yz"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ORDERS = {"relaxed": "RELAXED", "acquire": "ACQUIRE", "release": "RELEASE", "acq_rel": "ACQUIRE | RELEASE"}
CACHE_HINTS = {"cg", "ca", "cs", "lu", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::cache_hint"}

Site = Callable[[str], int]
_table: dict[str, Callable[..., str]] = {}


class UnknownInstructionError(Exception):
    """The translator does not know this instruction, or this form of it."""


@dataclass
class Operands:
    """The operands of an instruction, as text. parameters: the names of the kernel's."""

    texts: list[str]
    parameters: list[str]

    @classmethod
    def parsed(cls, text: str, parameters: list[str]) -> "Operands":
        """{a, b} and [a + 4] are one operand each."""
        return cls(
            [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text) if part.strip()], parameters
        )

    def __getitem__(self, k: int) -> str:
        return self.texts[k]

    def __len__(self) -> int:
        return len(self.texts)

    def register(self, k: int) -> str:
        """The variable of a register that is written."""
        return self.texts[k].removeprefix("%")

    def bits(self, k: int, kind: str) -> str:
        """The bits of operand k."""
        return bits_of(self.texts[k], kind)

    def number(self, k: int, kind: str) -> str:
        """Operand k as a number of that type."""
        value = self.bits(k, kind)
        return f"{READ[kind]}({value})" if kind in READ else f"({TYPES[kind]})({value})"

    def vector(self, k: int) -> list[str]:
        """The parts of {a, b}, or the one operand."""
        return [part.strip() for part in self.texts[k].strip("{} ").split(",")]

    def address(self, k: int) -> str:
        """The address in [a + 4]."""
        match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", self.texts[k])
        if not match:
            raise UnknownInstructionError(self.texts[k])
        return f"(u64)({bits_of(match[1], 'u64')}) + (s64)({match[2] or 0})"


def bits_of(text: str, kind: str) -> str:
    """The bits of a register, a special register, a number or the address of shared memory."""
    if text in SPECIAL:
        return SPECIAL[text]
    if text.startswith("%"):
        return text[1:]
    if text == "global_smem":
        return "0"
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        return f"0x{match[1] or match[2]}ull"
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", text):
        return f"({TYPES[kind]})({int(text, 0) & (2**64 - 1)}ull)"
    raise UnknownInstructionError(text)


def emit(name: str, operands: Operands, site: Site) -> str:
    """The instruction in C++. site: numbers an access to memory."""
    first, *parts = name.split(".")
    if first not in _table:
        raise UnknownInstructionError(f"{name} {', '.join(operands.texts)}")
    try:
        return _table[first](name, parts, operands, site)
    except (KeyError, IndexError, ValueError) as error:
        raise UnknownInstructionError(f"{name} {', '.join(operands.texts)}") from error


def instruction(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Enters a function in the table."""

    def enter(function: Callable[..., str]) -> Callable[..., str]:
        _table.update(dict.fromkeys(names, function))
        return function

    return enter


def _only(parts: list[str], *known: str) -> None:
    """Raises UnknownInstructionError if there is a part that is not known."""
    if unknown := [part for part in parts if part not in known]:
        raise UnknownInstructionError(".".join(parts) + f": {unknown[0]}")


def _put(operands: Operands, expression: str, kind: str) -> str:
    """Writes a number to the first operand."""
    stored = {"f32": "bits((float)({}))", "f64": "bits((double)({}))", **{k: f"{f}({{}})" for k, f in NARROW.items()}}
    return f"{operands.register(0)} = {stored.get(kind, '({})').format(expression)};"


@instruction("ret", "exit")
def leave(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.12: the thread has ended."""
    return "return;"


@instruction("bra")
def branch(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.12, bra. `.uni` says that all threads of a warp take it."""
    _only(parts, "uni")
    return f"goto {operands[0].removeprefix('$')};"


@instruction("bar")
def barrier(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.13, bar.sync: waits for all threads of the program, and orders their accesses."""
    _only(parts, "sync")
    if operands.texts != ["0"]:
        raise UnknownInstructionError(f"{name} {operands.texts}")
    return f"barrier(me, {site(name)});"


@instruction("shfl")
def shuffle(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, shfl.sync.bfly over a whole warp: the value of the lane whose number differs in the given bits. It orders
    no accesses."""
    _only(parts, "sync", "bfly", "b32")
    if operands.texts[3:] != ["31", "-1"]:
        raise UnknownInstructionError(f"{name} {operands.texts}")
    value, mask = operands.bits(1, "b32"), operands.bits(2, "b32")
    return f"{operands.register(0)} = meet(me, EXCHANGE, {value}, {mask}, {site(name)});"


@instruction("redux")
def reduce_warp(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.13, redux.sync over a whole warp: the least or the largest of 32 signed integers."""
    _only(parts, "sync", "min", "max", "s32")
    kind = {"min": "LEAST", "max": "MOST"}[parts[1]]
    return f"{operands.register(0)} = meet(me, {kind}, {operands.bits(1, 's32')}, 0, {site(name)});"


@instruction("ld")
def load(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, ld: of a parameter, of global or of shared memory. Cache hints change no value."""
    if parts[0] == "param":
        return f"{operands.register(0)} = parameters[{operands.parameters.index(operands[1].strip('[] '))}];"
    kind, into = parts[-1], operands.vector(0)
    call = _access(name, parts, operands.address(1), len(into), site)
    written = " ".join(f"{of[1:]} = ({TYPES[kind]})part[{k}];" for k, of in enumerate(into) if of != "_")
    return f"{TYPES[kind]} part[{len(into)}]; {call} {written}"


@instruction("createpolicy")
def policy(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, createpolicy: how long L2 keeps what an access with this hint touches. It changes no value."""
    _only(parts, "fractional", "L2::evict_first", "L2::evict_last", "b64")
    return f"{operands.register(0)} = 0;"


@instruction("st")
def store(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, st: to global or to shared memory."""
    kind, values = parts[-1], operands.vector(1)
    listed = ", ".join(f"({TYPES[kind]})({bits_of(of, kind)})" for of in values)
    return f"{TYPES[kind]} part[] = {{{listed}}}; {_access(name, parts, operands.address(0), len(values), site)}"


def _access(name: str, parts: list[str], address: str, count: int, site: Site) -> str:
    """A load into `part` or a store from it."""
    space, kind = parts[0].split("::")[0], parts[-1]
    others = [part for part in parts[1:-1] if part not in CACHE_HINTS]
    orders = [ORDERS[part] for part in others if part in ORDERS]
    _only([part for part in others if part not in ORDERS], "gpu", "cta", "volatile", f"v{count}")
    if count > 1 and f"v{count}" not in others:
        raise UnknownInstructionError(name)
    how = {"ld": "load", "st": "store"}[name.split(".")[0]]
    order = f"{orders[0] if orders else 'WEAK'}, " if space == "global" else ""
    return f"{how}_{space}<{TYPES[kind]}, {count}>(me, {address}, {order}{site(name)}, part);"


@instruction("stmatrix")
def store_matrix(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.15, stmatrix.m8n8.x4: a warp writes four 8 × 8 matrices of 16 bits. Lane i gives the address of row i % 8 of
    matrix i / 8, and holds in register k elements 2·(i % 4) and the next, of row i / 4 of matrix k."""
    if parts != ["sync", "aligned", "m8n8", "x4", "shared", "b16"]:
        raise UnknownInstructionError(name)
    values = ", ".join(f"(u32){bits_of(of, 'b32')}" for of in operands.vector(1))
    return f"u32 part[] = {{{values}}}; store_matrix(me, {operands.address(0)}, {site(name)}, part);"


@instruction("atom", "red")
def atomic(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.13, atom: reads and writes in one. `atom` returns what was there."""
    _only(parts, "global", "gpu", *ORDERS, "add", "exch", "min", "max", "u32", "b32", "s32", "u64", "b64", "s64")
    kind, what = parts[-1], parts[-2]
    at = 1 if name.startswith("atom.") else 0
    value = operands.number(at + 1, kind)
    new = {"add": f"old + {value}", "exch": value, "min": f"least(old, {value})", "max": f"most(old, {value})"}[what]
    order = next((ORDERS[part] for part in parts if part in ORDERS), "RELAXED")
    of = TYPES[kind]
    where = f"{operands.address(at)}, {order}, {site(name)}"
    call = f"atomic<{of}>(me, {where}, [&]({of} old) {{ return ({of})({new}); }});"
    return f"{operands.register(0)} = {call}" if at and operands[0] != "_" else call


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
    """9.7.9, cvt. `.rn` rounds to nearest, ties to even. `.rzi` gives an integer, toward zero and within its range; nan
    gives 0. `x2` makes two: the first source is the higher half."""
    *modes, to, source = parts
    _only(modes, "rn", "rzi")
    if to in ("f16x2", "bf16x2"):
        high, low = (f"(u32){NARROW[to[:-2]]}({operands.number(k, source)})" for k in (1, 2))
        return f"{operands.register(0)} = {high} << 16 | {low};"
    value = operands.number(1, source)
    if source in READ and to not in READ:
        _only(modes, "rzi")
        return f"{operands.register(0)} = truncated<{TYPES[to]}>({value});"
    return _put(operands, value if to in READ else f"({TYPES[to]}){value}", to)


@instruction("selp")
def select(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.6, selp: a if p, else b."""
    kind = parts[0]
    return f"{operands.register(0)} = {operands.bits(3, 'pred')} ? {operands.bits(1, kind)} : {operands.bits(2, kind)};"


@instruction("setp")
def compare(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.6, setp. With nan, the plain comparisons are false and those that end in u are true. `num` is neither nan,
    `nan` either. `x2` compares both halves, for p|q."""
    how, kind = parts
    if kind.endswith("x2"):
        targets = [of.strip().removeprefix("%") for of in operands[0].split("|")]
        read, values = READ[kind[:-2]], [operands.bits(k, kind) for k in (1, 2)]
        halves = [[f"{read}((u16)({of} >> {shift}))" for of in values] for shift in (0, 16)]
        return " ".join(f"{p} = {_compared(how, *of)};" for p, of in zip(targets, halves, strict=True))
    return (
        f"{operands.register(0)} = {_compared(how, operands.number(1, kind), operands.number(2, kind), kind in READ)};"
    )


def _compared(how: str, a: str, b: str, floats: bool = True) -> str:
    number = f"({a} == {a} && {b} == {b})"
    if how in ("num", "nan"):
        return number if how == "num" else f"!{number}"
    if floats and how.endswith("u"):
        return f"(!{number} || {a} {COMPARE[how[:-1]]} {b})"
    if floats and how == "ne":
        return f"({number} && {a} != {b})"
    return f"({a} {COMPARE[how]} {b})"


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


@instruction("bfe")
def bit_field(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1, bfe: so many bits from a position."""
    _only(parts, "u32")
    a, position, length = (operands.bits(k, "u32") for k in (1, 2, 3))
    return f"{operands.register(0)} = bit_field({a}, {position}, {length});"


@instruction("add", "sub", "mul", "div", "rem", "min", "max")
def arithmetic(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.1 for integers, 9.7.3 for floats, 9.7.4 for 16 bits. `.wide` doubles the width. min and max give the other
    number for a nan. div.full.f32 is within 2 ulp; div.rn is exact."""
    what, kind = name.split(".")[0], parts[-1]
    _only(parts[:-1], "rn", "lo", "wide", "full")
    if kind.endswith("x2"):
        halves = [
            "(u32)" + NARROW[kind[:-2]] + "({} {} {})".format(
                *(f"{READ[kind[:-2]]}((u16)({operands.bits(1, kind)} >> {shift}))",
                  {"add": "+", "sub": "-", "mul": "*"}[what],
                  f"{READ[kind[:-2]]}((u16)({operands.bits(2, kind)} >> {shift}))")
            )
            for shift in (16, 0)
        ]  # fmt: skip
        return f"{operands.register(0)} = {halves[0]} << 16 | {halves[1]};"
    a, b = operands.number(1, kind), operands.number(2, kind)
    if what in ("min", "max"):
        return _put(operands, f"{'least' if what == 'min' else 'most'}({a}, {b})", kind)
    sign = {"add": "+", "sub": "-", "mul": "*", "div": "/", "rem": "%"}[what]
    if "wide" in parts:
        wide = f"{kind[0]}{2 * WIDTHS[kind]}"
        return f"{operands.register(0)} = ({wide}){a} * ({wide}){b};"
    if what in ("div", "rem") and kind not in READ:
        return f"{operands.register(0)} = {b} == 0 ? ({TYPES[kind]})-1 : {a} {sign} {b};"
    if kind not in READ:
        wide = f"u{WIDTHS[kind]}"
        return f"{operands.register(0)} = ({wide}){a} {sign} ({wide}){b};"
    exact = f"{a} {sign} {b}"
    return _put(operands, f"near({exact}, 2)" if "full" in parts else exact, kind)


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
        return _put(operands, f"-{a}", kind)
    return _put(operands, f"std::fabs({a})" if kind in READ else f"{a} < 0 ? -{a} : {a}", kind)


@instruction("sqrt")
def root(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.3, sqrt. `.rn` is exact. `.approx` is within 2⁻²³ of it, relatively: 1 ulp or 2. `.ftz` takes subnormal
    numbers, and gives them, as zeros."""
    *modes, kind = parts
    a = operands.number(1, kind)
    if modes == ["rn"]:
        return _put(operands, f"std::sqrt({a})", kind)
    if modes != ["approx", "ftz"]:
        raise UnknownInstructionError(name)
    return _put(operands, f"flushed(near(std::sqrt(flushed({a})), 1))", kind)
