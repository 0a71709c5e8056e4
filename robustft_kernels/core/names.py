"""Parameter names without what wrappers put into them."""

from collections.abc import Collection, Iterable

WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch.compile, FSDP, checkpointing


def unwrapped(name: str, wrappers: Collection[str] = WRAPPERS) -> str:
    """A name without the wrappers' own parts."""
    return ".".join(part for part in name.split(".") if part not in wrappers)


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put into it. `module.` in front, which DDP adds, goes too."""
    parts = unwrapped(name).split(".")
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def under_one_prefix(names: Collection[str], given: Collection[str]) -> dict[str, str] | None:
    """For each of these names the one of `given` that differs by a prefix, the same for all, which either side has
    more. A base model's checkpoint lacks the "bert." that a model with a head puts before its names. None if no prefix
    does, or several do."""
    if not names:
        return {}
    first = next(iter(names))
    ends = [at + 1 for at, letter in enumerate(first) if letter == "."]
    fewer = [first[:end] for end in ends if first[end:] in given]
    more = {key.removesuffix(first) for key in given if key.endswith(f".{first}")}
    ways = [{name: name.removeprefix(prefix) for name in names if name.startswith(prefix)} for prefix in fewer]
    ways += [{name: prefix + name for name in names} for prefix in more]
    whole = [way for way in ways if len(way) == len(names) and all(key in given for key in way.values())]
    return whole[0] if len(whole) == 1 else None


def some(names: Iterable[str], at_most: int = 10) -> str:
    """The first of these names, quoted, and how many more there are."""
    given = list(names)
    rest = f" and {len(given) - at_most} more" if len(given) > at_most else ""
    return ", ".join(map(repr, given[:at_most])) + rest
