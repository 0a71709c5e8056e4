"""The PTX instructions that reach memory, as C++. The sections are those of NVIDIA's "PTX ISA", version 9."""

from .operands import TYPES, Operands, Site, UnknownInstructionError, bits_of, instruction, only

ORDERS = {"relaxed": "RELAXED", "acquire": "ACQUIRE", "release": "RELEASE", "acq_rel": "ACQUIRE | RELEASE"}
CACHE_HINTS = {"cg", "ca", "cs", "lu", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::cache_hint"}
WINDOWS = {"shared": "SHARED_WINDOW", "param": "PARAMETER_WINDOW", "global": "0"}


@instruction("ld")
def load(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, ld: of a parameter, of global or shared memory, or of a generic address. Cache hints change no value."""
    kind, into = parts[-1], operands.vector(0)
    written = " ".join(f"{of[1:]} = ({TYPES[kind]})part[{k}];" for k, of in enumerate(into) if of != "_")
    return f"{TYPES[kind]} part[{len(into)}]; {_access(name, parts, operands, 1, len(into), site)} {written}"


@instruction("st")
def store(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, st: to global or shared memory, to a generic address, or to the parameter of a call."""
    kind, values = parts[-1], operands.vector(1)
    listed = ", ".join(f"({TYPES[kind]})({bits_of(of, kind)})" for of in values)
    return f"{TYPES[kind]} part[] = {{{listed}}}; {_access(name, parts, operands, 0, len(values), site)}"


def _access(name: str, parts: list[str], operands: Operands, at: int, count: int, site: Site) -> str:
    """A load into `part` or a store from it. at: the operand that is the address."""
    space, others, kind = parts[0].split("::")[0], parts[1:-1], parts[-1]
    if space not in WINDOWS:
        space, others = "generic", parts[:-1]
    orders = [ORDERS[part] for part in others if part in ORDERS]
    only([part for part in others if part not in {*ORDERS, *CACHE_HINTS}], "gpu", "cta", "volatile", f"v{count}")
    if count > 1 and f"v{count}" not in others:
        raise UnknownInstructionError(f"{count} values")
    stores = name.startswith("st")
    if space == "param" and (local := _of_call(operands, at, stores)):
        return local
    order = f"{orders[0] if orders else 'WEAK'}, " if space in ("global", "generic") else ""
    used = f", {operands.used}" if operands.used and not stores else ""
    how = f"{'store' if stores else 'load'}_{'parameter' if space == 'param' else space}<{TYPES[kind]}, {count}>"
    return f"{how}(me, {operands.address(at)}, {order}{site(name)}, part{used});"


def _of_call(operands: Operands, at: int, stores: bool) -> str:
    """An access to the parameter of a call, which is an array of its own. Empty: it is a kernel's, at an address."""
    base, offset = operands.base(at)
    if base.startswith("%") or base.isdigit():
        if stores:
            raise UnknownInstructionError("a kernel's parameter is written")
        return ""
    ends = (f"p_{base} + {offset}", "part")
    to, source = ends if stores else reversed(ends)
    return f"std::memcpy({to}, {source}, sizeof part);"


@instruction("cvta")
def to_generic(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, cvta: from an address of one space to the generic one. `.to`: back. Shared memory and a kernel's
    parameters have windows among the generic addresses. Those of global memory are themselves."""
    back = parts[0] == "to"
    space, kind = parts[1:] if back else parts
    only([kind], "u64")
    return f"{operands.register(0)} = {operands.bits(1, 'u64')} {'-' if back else '+'} {WINDOWS[space.split('::')[0]]};"


@instruction("createpolicy")
def policy(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.9, createpolicy: how long L2 keeps what an access with this hint touches. It changes no value."""
    only(parts, "fractional", "L2::evict_first", "L2::evict_last", "b64")
    return f"{operands.register(0)} = 0;"


@instruction("stmatrix")
def store_matrix(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.15, stmatrix.m8n8.x4: a warp writes four 8 × 8 matrices of 16 bits. Lane i gives the address of row i % 8 of
    matrix i / 8, and holds in register k elements 2·(i % 4) and the next, of row i / 4 of matrix k."""
    only(parts, "sync", "aligned", "m8n8", "x4", "shared", "b16")
    if len(parts) != 6:
        raise UnknownInstructionError(name)
    values = ", ".join(f"(u32){bits_of(of, 'b32')}" for of in operands.vector(1))
    return f"u32 part[] = {{{values}}}; store_matrix(me, {operands.address(0)}, {site(name)}, part);"


@instruction("atom", "red")
def atomic(name: str, parts: list[str], operands: Operands, site: Site) -> str:
    """9.7.13, atom: reads and writes in one, in global memory. `atom` returns what was there."""
    only(parts, "global", "gpu", *ORDERS, "add", "exch", "min", "max", "u32", "b32", "s32", "u64", "b64", "s64")
    if "global" not in parts:
        raise UnknownInstructionError("a generic address")
    kind, what = parts[-1], parts[-2]
    at = 1 if name.startswith("atom.") else 0
    value = operands.number(at + 1, kind)
    new = {"add": f"old + {value}", "exch": value, "min": f"least(old, {value})", "max": f"most(old, {value})"}[what]
    order = next((ORDERS[part] for part in parts if part in ORDERS), "RELAXED")
    of = TYPES[kind]
    where = f"{operands.address(at)}, {order}, {site(name)}"
    call = f"atomic<{of}>(me, {where}, [&]({of} old) {{ return ({of})({new}); }});"
    return f"{operands.register(0)} = {call}" if at and operands[0] != "_" else call
