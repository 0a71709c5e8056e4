"""The operands of PTX instructions, and the table of what makes C++ of each instruction.

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

Site = Callable[[str], int]
_table: dict[str, Callable[..., str]] = {}


class UnknownInstructionError(Exception):
    """The translator does not know this instruction, or this form of it."""


@dataclass
class Operands:
    """The operands of an instruction, as text. used: how many bytes of what it loads matter, if not all."""

    texts: list[str]
    used: int = 0

    @classmethod
    def parsed(cls, text: str, used: int = 0) -> "Operands":
        """{a, b} and [a + 4] are one operand each."""
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]]+", text)
        return cls([part.strip() for part in parts if part.strip()], used)

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

    def base(self, k: int) -> tuple[str, int]:
        """What is in [a + 4]: a and 4."""
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", self.texts[k])
        if not match:
            raise UnknownInstructionError(self.texts[k])
        return match[1], int(match[2] or 0)

    def address(self, k: int) -> str:
        """The address in [a + 4]."""
        base, offset = self.base(k)
        return f"(u64)({bits_of(base, 'u64')}) + (s64)({offset})"


def bits_of(text: str, kind: str) -> str:
    """The bits of a register, a special register or a number."""
    if text in SPECIAL:
        return SPECIAL[text]
    if re.fullmatch(r"%\w+", text):
        return text[1:]
    if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        return f"0x{match[1] or match[2]}ull"
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return f"({TYPES[kind]})({int(text.rstrip('U'), 0) & (2**64 - 1)}ull)"
    raise UnknownInstructionError(text)


def emit(name: str, operands: Operands, site: Site) -> str:
    """The instruction in C++. site: numbers an access to memory."""
    first, *parts = name.split(".")
    told = f"{name} {', '.join(operands.texts)}"
    if first not in _table:
        raise UnknownInstructionError(told)
    try:
        return _table[first](name, parts, operands, site)
    except (KeyError, IndexError, ValueError) as error:
        raise UnknownInstructionError(told) from error
    except UnknownInstructionError as error:
        raise UnknownInstructionError(f"{told}: {error}") from error


def instruction(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Enters a function in the table."""

    def enter(function: Callable[..., str]) -> Callable[..., str]:
        _table.update(dict.fromkeys(names, function))
        return function

    return enter


def only(parts: list[str], *known: str) -> None:
    """Raises UnknownInstructionError if there is a part that is not known."""
    if unknown := [part for part in parts if part not in known]:
        raise UnknownInstructionError(unknown[0])


def put(operands: Operands, expression: str, kind: str) -> str:
    """Writes a number to the first operand."""
    stored = {"f32": "bits((float)({}))", "f64": "bits((double)({}))", **{k: f"{f}({{}})" for k, f in NARROW.items()}}
    return f"{operands.register(0)} = {stored.get(kind, '({})').format(expression)};"
