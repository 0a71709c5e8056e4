"""Which tensor of BASE, or of another TUNED, belongs to which tensor of TUNED, and whether the two fit."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..core.names import bare_name, some, under_one_prefix
from .source import Source


@dataclass(frozen=True)
class Pairs:
    """The pairs of two checkpoints.

    base_of: for the name of an entry of TUNED that has a θ₀, the name of that in BASE. All are floats.
    integers, excluded: the entries of TUNED that have none, by why.
    """

    base_of: dict[str, str]
    integers: list[str]
    excluded: list[str]


def pair(base: Source, tuned: Source, exclude: Iterable[str] = ()) -> Pairs:
    """Pairs the tensors of two checkpoints by name. What wrappers put into names does not count, nor does one prefix
    that one side puts before the names that the other lacks, such as "bert.".

    exclude: names, prefixes of whole components, or patterns with * of what stays as it is in TUNED, such as a fresh
        head. It may also name what only BASE has, such as the old head.

    Raises ValueError, listing what differs: tensors that one side lacks, other shapes, floats against integers, numbers
    that have no arithmetic here, and exclude matching nothing.
    """
    (pairs,) = _paired([("TUNED", tuned), ("BASE", base)], exclude)
    return pairs


def pair_many(tuned: Sequence[Source], base: Source | None, exclude: Iterable[str] = ()) -> list[Pairs]:
    """Pairs the tensors of the first of several TUNED with those of each other, and of BASE at last if there is one.
    All have θ₀ for the same entries.

    exclude: what stays as it is in the first.

    Raises as `pair` does. Messages number the TUNED from 1.
    """
    sides = [(f"TUNED {k}", source) for k, source in enumerate(tuned, 1)]
    return _paired([*sides, *([("BASE", base)] if base else [])], exclude)


def _paired(sides: Sequence[tuple[str, Source]], exclude: Iterable[str]) -> list[Pairs]:
    """The pairs of the first checkpoint with each other one. Messages call them by their labels."""
    keys = [_keys(source, label) for label, source in sides]
    left = _excluded(exclude, keys, " or ".join(label for label, _ in sides))
    return [_pair(*sides[0], keys[0], *other, theirs, left) for other, theirs in zip(sides[1:], keys[1:], strict=True)]


def _pair(
    label: str,
    tuned: Source,
    ours: Mapping[str, str],
    other_label: str,
    base: Source,
    theirs: dict[str, str],
    left: set[str],
) -> Pairs:
    names: dict[str, list[str]] = {}
    for bare, key in ours.items():
        names.setdefault(key, []).append(bare)
    alone = [of[0] for of in names.values() if left.isdisjoint(of) and theirs.keys().isdisjoint(of)]
    theirs |= {bare: theirs[other] for bare, other in (under_one_prefix(alone, theirs) or {}).items()}
    pairs = Pairs({}, [], [])
    lacking, unfit = [], []
    for key, entry in tuned.entries.items():
        candidates = {theirs[bare]: None for bare in names[key] if bare in theirs}
        if not left.isdisjoint(names[key]):
            pairs.excluded.append(key)
            continue
        if not candidates:
            lacking.append(key)
            continue
        if len(candidates) > 1:
            unfit.append(f"{label} ties {some(names[key])}, which {other_label} has apart")
            continue
        (found,) = candidates
        other = base.entries[found]
        if (entry.shape, entry.kind) != (other.shape, other.kind):
            unfit.append(f"{key!r} is {entry} in {label}, {other} in {other_label}")
        elif entry.kind == "other":
            unfit.append(f"{key!r} is {entry.dtype}, which is not computed with; convert both to BF16 first")
        elif entry.kind == "integer":
            pairs.integers.append(key)
        else:
            pairs.base_of[key] = found
    used = {theirs[bare] for bare in ours if bare in theirs}
    surplus = [key for bare, key in theirs.items() if key not in used and bare not in left]
    objections = [f"{other_label} lacks {some(lacking)}"] if lacking else []
    objections += [f"{label} lacks {some(dict.fromkeys(surplus))}, which {other_label} has"] if surplus else []
    objections += unfit[:10] + [f"{len(unfit) - 10} more do not fit"] * (len(unfit) > 10)
    if objections:
        raise ValueError(
            f"{'; '.join(objections)}. --exclude NAME leaves a tensor as it is in {label}, as a fresh head"
        )
    if not pairs.base_of:
        raise ValueError("there is no tensor of floats that both have")
    return pairs


def _keys(source: Source, label: str) -> dict[str, str]:
    """The name of the entry for each name of a tensor, without what wrappers add. Raises ValueError if two entries then
    have one name."""
    keys: dict[str, str] = {}
    for name, key in {**{name: name for name in source.entries}, **source.ties}.items():
        if keys.setdefault(bare_name(name), key) != key:
            raise ValueError(
                f"{label} has {name!r} and {keys[bare_name(name)]!r}, which a wrapper's prefix alone tells"
            )
    return keys


def _excluded(exclude: Iterable[str], sides: Sequence[Mapping[str, str]], labels: str) -> set[str]:
    """The names that are excluded. Raises ValueError if a pattern matches none on any side."""
    names = {name for keys in sides for name in keys}
    excluded: set[str] = set()
    for given in exclude:
        pattern = bare_name(given)
        found = {name for name in names if f"{name}.".startswith(f"{pattern}.") or fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"--exclude {given!r} matches no tensor of {labels}")
        excluded |= found
    return excluded
