"""PTX to a C++ function that machine.h runs, one for each kernel."""

import re
from dataclasses import dataclass, field
from pathlib import PurePath

from .instructions import TYPES, Operands, UnknownInstructionError, emit

LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:.*inlined_at\s+\d+\s+(\d+))?")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>")
ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\((.*?)\)(.*?)\{(.*?)^\}", re.S | re.M)
GUARD = re.compile(r"@(!?)%(\w+)\s+(.*)", re.S)


@dataclass
class Kernel:
    """A kernel of a PTX module.

    threads: of a program, which PTX calls a CTA. sites: for each access the line of the source, the line that called
        its function, and the instruction. source: C++, which has the numbers of the sites.
    """

    name: str
    parameters: list[str]
    threads: int
    source: str
    sites: list[str]


@dataclass
class _Body:
    parameters: list[str]
    files: dict[int, str]
    sites: list[str] = field(default_factory=list)
    place: str = "?"

    def site(self, instruction: str) -> int:
        """The number of an access at the present line of the source."""
        site = f"{self.place} {instruction}"
        if site not in self.sites:
            self.sites.append(site)
        return self.sites.index(site)

    def statement(self, text: str) -> str:
        """One PTX statement in C++."""
        if match := LOC.match(text):
            if line := int(match[2]):
                caller = f" from {match[3]}" if match[3] else ""
                self.place = f"{self.files.get(int(match[1]), '?')}:{line}{caller}"
            return ""
        if match := REGISTERS.match(text):
            names = ", ".join(f"{match[2]}{k} = 0" for k in range(int(match[3])))
            return f"{TYPES[match[1]]} {names};"
        if match := re.match(r"\$(\w+):$", text):
            return f"{match[1]}:;"
        if text.startswith("."):
            raise UnknownInstructionError(text)
        guard = ""
        if match := GUARD.match(text):
            guard, text = f"if ({match[1]}{match[2]}) ", match[3]
        name, _, rest = text.partition(" ")
        return f"{guard}{{ {emit(name, Operands.parsed(rest, self.parameters), self.site)} }}"


def translate(ptx: str) -> Kernel:
    """The kernel of a module with one. Raises UnknownInstructionError naming what it does not know."""
    files = {int(k): PurePath(name).name for k, name in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    code = re.sub(r"//.*", "", re.split(r"^\s*\.section", ptx, flags=re.M)[0])
    found = ENTRY.findall(code)
    if len(found) != 1:
        raise ValueError(f"a module with one kernel is needed, this has {len(found)}")
    name, parameters, head, text = found[0]
    body = _Body([of.split()[-1] for of in parameters.split(",") if of.strip()], files)
    lines = [body.statement(statement) for statement in _statements(text)]
    if not (threads := re.search(r"\.(?:req|max)ntid\s+(\d+)", head)):
        raise ValueError(f"{name} does not say how many threads it has")
    return Kernel(name, body.parameters, int(threads[1]), "\n".join(filter(None, lines)), body.sites)


def _statements(text: str) -> list[str]:
    """What ends in a semicolon, and the lines of .loc and of labels."""
    parts = re.split(r";|(^[ \t]*\.loc.*$)|(^[ \t]*\$\w+:)", text, flags=re.M)
    return [" ".join(part.split()) for part in parts if part and part.strip()]
