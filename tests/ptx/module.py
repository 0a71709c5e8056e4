"""What a PTX module holds: its kernels, its functions and its shared memory (PTX ISA, sections 5 and 11)."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from .operands import TYPES, WIDTHS, UnknownInstructionError

HEAD = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?([^;{}]*)([;{])"
)
VARIABLE = r"\.(param|shared)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+[^,;)]*?)?([\w$]+)\s*((?:\[\d*\])*)\s*$"
SHARED = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.shared\s[^;]*")
CALL = re.compile(
    r"call(?:\.uni)?\s+(?:\(\s*([^()]*?)\s*\)\s*,\s*)?([A-Za-z_$][\w$]*)\s*(?:,\s*\(\s*([^()]*?)\s*\)\s*)?$"
)


@dataclass(frozen=True)
class Variable:
    """A parameter, or a place in shared memory. size: in bytes; 0 if the launch says it."""

    name: str
    size: int
    align: int

    @classmethod
    def parsed(cls, text: str) -> "Variable":
        """Of `.param .align 8 .b8 name[24]`, or the like."""
        match = re.search(VARIABLE, text)
        if not match or match[3] not in TYPES:
            raise UnknownInstructionError(text)
        width = (WIDTHS[match[3]] + 7) // 8
        count = prod(int(of or 0) for of in re.findall(r"\[(\d*)\]", match[5]))
        return cls(match[4], width * count, int(match[2] or width))


@dataclass(frozen=True)
class Function:
    """A kernel or a function, with its statements."""

    name: str
    kernel: bool
    results: list[Variable]
    parameters: list[Variable]
    head: str
    body: str


@dataclass(frozen=True)
class Module:
    """functions: by name. shared: what is declared outside of them."""

    functions: dict[str, Function]
    shared: list[Variable]

    @classmethod
    def parsed(cls, ptx: str) -> "Module":
        """Of PTX without comments and sections of debuggers."""
        functions, outside, end = {}, [], 0
        while match := HEAD.search(ptx, end):
            outside.append(ptx[end : match.start()])
            end = match.end()
            if match[6] == ";":
                continue  # a declaration
            closed = _closed(ptx, end)
            functions[match[3]] = Function(
                name=match[3],
                kernel=match[1] == "entry",
                results=_listed(match[2]),
                parameters=_listed(match[4]),
                head=match[5],
                body=ptx[end : closed - 1],
            )
            end = closed
        outside.append(ptx[end:])
        return cls(functions, list(shared_in("".join(outside))))

    def kernel(self, name: str | None) -> Function:
        """The kernel of that name, or the only one."""
        kernels = [of for of in self.functions.values() if of.kernel and name in (None, of.name)]
        if len(kernels) != 1:
            kind = "a module with one kernel is needed, this" if name is None else f"of {name}, the module"
            raise ValueError(f"{kind} has {len(kernels)}")
        return kernels[0]

    def reached(self, kernel: Function) -> list[Function]:
        """The kernel and the functions that it calls, and those that they call."""
        found, left = {kernel.name: kernel}, [kernel]
        while left:
            for name in called(left.pop().body):
                if name not in self.functions:
                    raise UnknownInstructionError(f"call of {name}, which the module does not have")
                if name not in found:
                    found[name] = self.functions[name]
                    left.append(found[name])
        return list(found.values())

    def laid_out(self, functions: list[Function]) -> tuple[dict[str, int], int]:
        """Where the shared memory of these functions lies, and its size. What the launch adds comes after it."""
        used = set(re.findall(r"[\w$]+", " ".join(of.body for of in functions)))
        inside = [variable for of in functions for variable in shared_in(of.body)]
        listed = [*inside, *(of for of in self.shared if of.name in used)]
        return laid_out(sorted(listed, key=lambda of: of.size == 0))


def plain(ptx: str) -> str:
    """PTX without comments."""
    ptx = re.sub(r"(\.loc.*?)\s*//[^@\n]*@\[ [\w.]+:(\d+):.*", r"\1, inlined_at 1 \2", ptx)  # Triton 3.6 tells it so
    return re.sub(r"//.*", "", ptx)


def code_of(ptx: str) -> str:
    """PTX without comments and without what debuggers read."""
    return plain(re.split(r"^\s*\.section", ptx, flags=re.M)[0])


def laid_out(variables: Iterable[Variable]) -> tuple[dict[str, int], int]:
    """Where each lies, one after the other, and the size of all."""
    places, end = {}, 0
    for of in variables:
        places[of.name] = end = -(-end // of.align) * of.align
        end += of.size
    return places, end


def shared_in(text: str) -> Iterator[Variable]:
    """The shared memory that is declared there."""
    yield from (Variable.parsed(of) for of in SHARED.findall(text))


def called(text: str) -> Iterator[str]:
    """The functions that are called there."""
    for statement in text.split(";"):
        if match := CALL.search(" ".join(statement.split())):
            yield match[2]


def _listed(text: str | None) -> list[Variable]:
    return [Variable.parsed(of) for of in (text or "").split(",") if of.strip()]


def _closed(text: str, begin: int) -> int:
    """The end of the braces that are open at `begin`."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return begin + brace.end()
    raise ValueError("a brace is not closed")
