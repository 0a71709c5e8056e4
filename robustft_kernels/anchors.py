"""Where θ₀ lives: a copy of the weights at construction, nowhere (zero), or tensors of the user's."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from .state import beside, copy_beside

Anchor = str | Sequence[Tensor] | Mapping[str, Tensor] | None
KINDS = ("initial", "zero")


def resolve(
    spec: Anchor, params: list[Tensor], names: list[str] | None, labels: list[str], *, anchored: bool
) -> tuple[str, list[Tensor] | None]:
    """What a group's `anchor` means: its kind ("initial", "zero" or "given"), and one tensor for each parameter.

    spec: "initial" copies the weights as they are now; "zero", or None, keeps nothing; a sequence is parallel to
        `params`; a mapping goes by `names`. Given tensors are used as they are, and copied only if their memory
        layout differs from the parameter's. They are never written.
    anchored: whether the group's method needs them; if not, "initial" copies nothing.

    Raises ValueError for an unknown word, a missing or surplus entry, or a tensor that cannot anchor its parameter.
    """
    if spec is None or isinstance(spec, str):
        kind = "zero" if spec is None else spec
        if kind not in KINDS:
            raise ValueError(f"unknown anchor {spec!r}: use 'initial', 'zero', a list of tensors or a mapping by name")
        if kind == "zero" or not anchored:
            return kind, None
        return kind, [copy_beside(param, param) for param in params]
    given = _by_name(spec, names) if isinstance(spec, Mapping) else _in_order(spec, params)
    for anchor, param, label in zip(given, params, labels, strict=True):
        check_fits(anchor, param, label)
        _check_apart(anchor, param, label)
    return "given", [beside(param, anchor.detach()) for anchor, param in zip(given, params, strict=True)]


def check_no_surplus(spec: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Raises ValueError for names in an anchor mapping that no parameter bears."""
    if surplus := [name for name in spec if name not in set(names)]:
        raise ValueError(f"the anchor mapping names {_some(surplus)}, which no parameter bears; remove what is surplus")


def _by_name(spec: Mapping[str, Tensor], names: list[str] | None) -> list[Tensor]:
    if names is None:
        raise ValueError("an anchor mapping needs named parameters: pass model.named_parameters() as params")
    if missing := [name for name in names if name not in spec]:
        raise ValueError(f"the anchor mapping lacks {_some(missing)}; add what is missing")
    return [spec[name] for name in names]


def _in_order(spec: Sequence[Tensor], params: list[Tensor]) -> list[Tensor]:
    given = list(spec)
    if len(given) != len(params):
        raise ValueError(f"{len(given)} anchors for {len(params)} parameters: a list of anchors is parallel to params")
    return given


def check_fits(anchor: Tensor, param: Tensor, label: str) -> None:
    """Raises ValueError, or TypeError for no tensor, where `anchor` cannot be that of `param`, called `label`."""
    if not isinstance(anchor, Tensor):
        raise TypeError(f"the anchor of {label} is a {type(anchor).__name__}, not a tensor")
    if anchor.shape != param.shape:
        raise ValueError(f"the anchor of {label} has shape {tuple(anchor.shape)}, the parameter {tuple(param.shape)}")
    if anchor.device != param.device:
        raise ValueError(f"the anchor of {label} is on {anchor.device}, the parameter on {param.device}; move it there")
    if not anchor.is_floating_point():
        raise ValueError(f"the anchor of {label} is {anchor.dtype}; a floating-point tensor is needed")


def _check_apart(anchor: Tensor, param: Tensor, label: str) -> None:
    if anchor.numel() and anchor.untyped_storage().data_ptr() == param.untyped_storage().data_ptr():
        raise ValueError(f"the anchor of {label} shares its memory with a parameter and would move along; clone it")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(repr, names[:3])) + rest
