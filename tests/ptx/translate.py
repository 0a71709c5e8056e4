"""PTX to C++ functions that machine.h runs: one for the kernel, and one for each function that it reaches."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from .instructions import TYPES, Operands, UnknownInstructionError, emit
from .module import CALL, Function, Module, Variable, code_of, laid_out

LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+\d+\s+(\d+))?")
MANY = re.compile(r"%(\w+)<(\d+)>")
USED = re.compile(r'\.pragma\s+"used_bytes_mask\s+(\w+)"')
GUARD = re.compile(r"@(!?)%(\w+)\s+(.*)", re.S)
NAME = re.compile(r"(?<![\w$%.])[A-Za-z_$][\w$]*")
SPLIT = re.compile(r";|(^[ \t]*\.loc.*$)|(^[ \t]*[\w$]+:(?!:))", re.M)


@dataclass
class Kernel:
    """A kernel of a PTX module.

    parameters: where each begins. bytes: of all. shared: bytes of shared memory, without those that a launch adds.
    threads: of a program, which PTX calls a CTA. sites: for each access the line of the source, the line that called
        its function, and the instruction. source: C++, which has the numbers of the sites. In it, the kernel is the
        function `kernel`.
    """

    name: str
    parameters: list[Variable]
    places: list[int]
    bytes: int
    shared: int
    threads: int
    source: str
    sites: list[str]


@dataclass
class _Body:
    """What becomes of a function's statements. symbols: what stands for a name."""

    files: dict[int, str]
    symbols: dict[str, str]
    sites: dict[str, int]
    place: str = "?"
    used: int = 0  # bytes that matter of the next load, if not all
    lines: list[str] = field(default_factory=list)

    def site(self, instruction: str) -> int:
        """The number of an access at the present line of the source."""
        return self.sites.setdefault(f"{self.place} {instruction}", len(self.sites))

    def add(self, text: str) -> None:
        """One PTX statement in C++, with the braces before it."""
        while text[:1] in ("{", "}"):
            self.lines.append(text[0])
            text = text[1:].strip()
        if text:
            self.lines.append(self._directive(text) if text[0] == "." else self._statement(text))

    def _directive(self, text: str) -> str:
        if match := LOC.match(text):
            if line := int(match[2]):
                caller = f" from {match[3]}" if match[3] else ""
                self.place = f"{self.files.get(int(match[1]), '?')}:{line}{caller}"
            return ""
        if text.startswith(".reg "):
            return self._registers(text)
        if text.startswith(".param "):
            of = Variable.parsed(text)
            return f"alignas(16) u8 p_{of.name}[{of.size}];"
        if match := USED.match(text):
            self.used = int(match[1], 0).bit_length()
            return ""
        if text.startswith((".shared ", ".pragma ")):
            return ""
        raise UnknownInstructionError(text)

    def _registers(self, text: str) -> str:
        """Those of `.reg .b32 %r<3>`, or with names of their own, which may lack the %."""
        _, kind, names = text.split(maxsplit=2)
        listed = MANY.sub(lambda of: ", ".join(f"%{of[1]}{k}" for k in range(int(of[2]))), names)
        variables = [name.strip().removeprefix("%") for name in listed.split(",")]
        self.symbols |= {name: f"%{name}" for name in variables if f"%{name}" not in listed}
        return f"{TYPES[kind[1:]]} {', '.join(f'{name} = 0' for name in variables)};"

    def _statement(self, text: str) -> str:
        if match := re.fullmatch(r"([\w$]+):", text):
            return f"{match[1].replace('$', '')}:;"
        guard = ""
        text = self._named(text) if text.startswith("@") else text
        if match := GUARD.match(text):
            guard, text = f"if ({match[1]}{match[2]}) ", match[3]
        name, _, rest = text.partition(" ")
        if name.split(".")[0] == "call":
            return f"{guard}{_call(text)}"
        used, self.used = self.used, 0
        return f"{guard}{{ {emit(name, Operands.parsed(self._named(rest), used), self.site)} }}"

    def _named(self, text: str) -> str:
        return NAME.sub(lambda of: self.symbols.get(of[0], of[0]), text)


def translate(ptx: str, name: str | None = None) -> Kernel:
    """The kernel of that name, or of a module with one. Raises UnknownInstructionError naming what it does not know."""
    files = {int(k): PurePath(file).name for k, file in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    module = Module.parsed(code_of(ptx))
    kernel = module.kernel(name)
    functions = module.reached(kernel)
    shared, size = module.laid_out(functions)
    places, count = laid_out(kernel.parameters)
    symbols = {of: str(place) for of, place in (shared | places).items()}
    sites: dict[str, int] = {}
    source = [f"{_head(of)};" for of in functions]
    for of in functions:
        body = _Body(files, dict(symbols), sites)
        for statement in _statements(of.body):
            body.add(statement)
        source += [f"{_head(of)} {{", *filter(None, body.lines), "}"]
    return Kernel(
        name=kernel.name,
        parameters=kernel.parameters,
        places=list(places.values()),
        bytes=count,
        shared=size,
        threads=_threads(kernel),
        source="\n".join(source),
        sites=list(sites),
    )


def _threads(kernel: Function) -> int:
    if not (found := re.search(r"\.(?:req|max)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", kernel.head)):
        raise ValueError(f"{kernel.name} does not say how many threads it has")
    if {found[2], found[3]} - {None, "1"}:
        raise ValueError(f"{kernel.name}: threads have one number here")
    return int(found[1])


def _head(of: Function) -> str:
    """A call hands on the places of its parameters, and of what is returned."""
    if of.kernel:
        return "static void kernel(Thread& me)"
    places = "".join(f", u8* p_{variable.name}" for variable in [*of.parameters, *of.results])
    return f"__attribute__((noinline)) static void f_{of.name}(Thread& me{places})"


def _call(text: str) -> str:
    if not (match := CALL.fullmatch(text)):
        raise UnknownInstructionError(text)
    given = [of.strip() for part in (match[3], match[1]) for of in (part or "").split(",") if of.strip()]
    return f"f_{match[2]}({', '.join(['me', *(f'p_{of}' for of in given)])});"


def _statements(text: str) -> Iterator[str]:
    """What ends in a semicolon, and the lines of .loc and of labels."""
    yield from (" ".join(part.split()) for part in SPLIT.split(text) if part and part.strip())
