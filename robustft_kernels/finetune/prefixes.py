"""The parameters that names and prefixes mean. A prefix matches whole components."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

from torch import Tensor, nn

from ..core.names import bare_name
from ..core.unsharded import resharded


def names_of(given: nn.Module | Iterable[tuple[str, Tensor]]) -> dict[Tensor, list[str]]:
    """All names of every parameter, in order. Of FSDP2's parameters, it takes the shards."""
    if not isinstance(given, nn.Module | Iterable):
        raise TypeError(f"TPGM needs the model, or model.named_parameters(); got {type(given).__name__}")
    pairs = list(given.named_parameters(remove_duplicate=False) if isinstance(given, nn.Module) else given)
    names: dict[Tensor, list[str]] = {}
    owners: dict[str, Tensor] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError("TPGM needs the model, or pairs of name and parameter as of model.named_parameters()")
    for (given_name, _), param in zip(pairs, resharded(param for _, param in pairs), strict=True):
        name = bare_name(given_name)
        if owners.setdefault(name, param) is not param:
            raise ValueError(f"two parameters are called {name!r} (without what wrappers add); names must differ")
        names.setdefault(param, []).append(name)
    return names


def matching(patterns: str | Sequence[str], names: Mapping[Tensor, list[str]], argument: str) -> Iterator[Tensor]:
    """The parameters that a name or prefix matches, in the order of the patterns, then of the model."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        bare = bare_name(pattern)
        found = [p for p, own in names.items() if any(n == bare or n.startswith(f"{bare}.") for n in own)]
        if not found:
            raise ValueError(
                f"{argument}: {pattern!r} is neither a parameter's name nor a prefix of whole components of one; "
                f"the names are {', '.join(own[0] for own in islice(names.values(), 4))} ..."
            )
        yield from found
