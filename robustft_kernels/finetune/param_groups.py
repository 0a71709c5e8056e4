"""The choices of parameters that robust fine-tuning is compared with, as groups for any optimizer, with names."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.names import WRAPPERS, unwrapped
from ..core.ranges import NOT_NEGATIVE, Range, check_number
from ..core.unsharded import resharded

# A module of the model, the name of a module or parameter, or several of either.
Part = str | nn.Module | Iterable[str | nn.Module]
Group = dict[str, Any]
Options = Mapping[str, Any]

NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
    nn.InstanceNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm,
)  # fmt: skip

_WRAPPERS = {"module", *WRAPPERS}  # DDP's too


def linear_probe(
    model: nn.Module, head: Part, *, freeze: bool = True, head_options: Options | None = None
) -> list[Group]:
    """[head]: one group, with the parameters of `head`. The first half of LP-FT.

    A group is a new dict. It holds `params`, a list of (name, parameter) as `model.named_parameters()` has them, and
    the options given for it. Any torch.optim optimizer takes the list and keeps the names. torch's own optimizers then
    hold these very dicts, so make new ones for a second optimizer.

    Args:
        head: a module of the model, the name of a module or parameter, or several of either. A name matches whole
            components. Wrappers' parts of names (`module.`, `_orig_mod.`, `_fsdp_wrapped_module.`) may be left out.
        freeze: whether to set requires_grad: True in the groups, False everywhere else, so that no gradient is computed
            there. `keep_requires_grad` brings the flags back. If not, no flag is touched, and the groups have the same
            parameters whatever their flags. Batch-norm statistics are no parameters: in training mode they move in
            either case.
        head_options: further keys of the group, such as lr.

    If the head shares a parameter with the rest of the model, it belongs to the head.

    Raises:
        ValueError: a name that matches nothing, a module that is not of the model or has no parameters, or nothing but
            the head in the model. Also an option that the group has already. No flag is changed then.
        TypeError: a head that is neither module nor name.

    Source: Kumar et al., ICLR 2022 (linear probing, LP-FT).
    """
    named, ours = _split(model, head)
    return _groups(model, freeze, [(_named(named, ours), _options(head_options))])


def bitfit(
    model: nn.Module,
    head: Part,
    *,
    freeze: bool = True,
    options: Options | None = None,
    head_options: Options | None = None,
) -> list[Group]:
    """[biases, head]: the biases outside of the head, and all of the head.

    A bias is a parameter whose last name is `bias`, begins with `bias_` (nn.LSTM) or ends in `_bias`
    (nn.MultiheadAttention, query and value biases). The biases of norm layers are among them. `options` and
    `head_options` are further keys of the two groups. The other arguments, the form of the groups and the errors are
    those of `linear_probe`. ValueError too if there is no bias outside of the head.

    Source: Ben Zaken et al., ACL 2022.
    """
    named, ours = _split(model, head)
    biases = {id(param) for name, param in named if _is_bias(name) and id(param) not in ours}
    if not biases:
        raise ValueError("model has no biases outside of head; linear_probe trains the head alone")
    chosen = [(_named(named, biases), _options(options)), (_named(named, ours), _options(head_options))]
    return _groups(model, freeze, chosen)


def partial_fusion(
    model: nn.Module,
    head: Part,
    *,
    norms: type[nn.Module] | Iterable[type[nn.Module]] = (),
    freeze: bool = True,
    options: Options | None = None,
    head_options: Options | None = None,
) -> list[Group]:
    """[norms, head]: the parameters of the norm layers outside of the head, and all of the head.

    Norm layers are the modules of a type in `NORMS` (batch, synchronised batch, instance, layer, group and RMS norm of
    torch.nn). Modules of a type in `norms` are norm layers too: types of your own that do not derive from torch.nn's.
    `options` and `head_options` are further keys of the two groups. The other arguments, the form of the groups and the
    errors are those of `linear_probe`. ValueError too if no norm layer outside of the head has parameters, or a type in
    `norms` occurs nowhere.

    Source: Kanavati & Tsuneki, MIDL 2021 (partial fine-tuning of batch norm), as SPD and TPGM compare with it.
    """
    named, ours = _split(model, head)
    own = (norms,) if isinstance(norms, type) else tuple(norms)
    modules = list(model.modules())
    for kind in own:
        if not any(isinstance(module, kind) for module in modules):
            raise ValueError(f"norms has {kind.__name__}, of which model has no module")
    layers = [module for module in modules if isinstance(module, NORMS + own)]
    scales = {id(param) for layer in layers for param in layer.parameters()} - ours
    if not scales:
        raise ValueError("model has no norm layers with parameters outside of head; name types of your own in norms=")
    chosen = [(_named(named, scales), _options(options)), (_named(named, ours), _options(head_options))]
    return _groups(model, freeze, chosen)


def layerwise_decay(
    model: nn.Module,
    lr: float,
    decay: float,
    layers: Sequence[Part],
    *,
    options: Options | None = None,
    head_options: Options | None = None,
) -> list[Group]:
    """One group for each of `layers`, with lr·decay^k at the k-th from the top: LLRD.

    The form of the groups is that of `linear_probe`. No flag is touched. Parameters that do not require a gradient are
    left out.

    Args:
        lr: ≥ 0, of the last layer, the head.
        decay: in (0, 1].
        layers: from input to output, the head last. Each is a module, a name, or several that share one rate, given as
            for `linear_probe`. Together they hold every parameter that requires a gradient, each one once.
        options: further keys of every group. An lr here is refused. A scheduler scales all rates alike.
        head_options: further keys of the last group, which override the others, lr included.

    Raises:
        ValueError: lr or decay out of range, parameters in no layer or in several (all are listed), or a name that
            matches nothing. Also a layer without a parameter that requires a gradient, or an option that a group has
            already.
        TypeError: a layer that is neither module nor name.

    Sources: Howard & Ruder, ACL 2018 (discriminative fine-tuning), and Clark et al., ICLR 2020 (one decay by depth).
    """
    check_number("lr", lr, NOT_NEGATIVE)
    check_number("decay", decay, Range(high=1, above=True))
    if isinstance(layers, str | nn.Module) or not (layers := list(layers)):
        raise ValueError("layers must be a sequence of modules or names, from input to output")
    shared = _options(options, "lr")
    resharded(model.parameters())
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    found = [_find(model, layer, f"layers[{k}]") for k, layer in enumerate(layers)]
    homes = {name: [k for k, ids in enumerate(found) if id(param) in ids] for name, param in named}
    if homeless := [name for name, home in homes.items() if not home]:
        raise ValueError(f"no layer has {_all(homeless)}; add them to layers, or set requires_grad=False on them")
    if torn := [f"{name!r} (layers {home})" for name, home in homes.items() if len(home) > 1]:
        raise ValueError(f"several layers have {', '.join(torn)}; each parameter, tied or not, belongs to one")
    groups = []
    for k, ids in enumerate(found):
        if not (params := _named(named, ids)):
            raise ValueError(f"layers[{k}] has no parameter that requires a gradient; unfreeze it, or leave it out")
        groups.append({"params": params, "lr": lr * decay ** (len(layers) - 1 - k), **shared})
    groups[-1].update(_options(head_options))
    return groups


@contextmanager
def keep_requires_grad(model: nn.Module) -> Iterator[None]:
    """At the end of the `with` block, each parameter has the requires_grad that it had at its beginning, whatever
    happened in between."""
    flags = [(param, param.requires_grad) for param in resharded(model.parameters())]
    try:
        yield
    finally:
        resharded(model.parameters())
        for param, flag in flags:
            param.requires_grad_(flag)


def trained_parts(model: nn.Module, head: Part | None) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """The named parameters that require a gradient, in two lists: those outside of the head, and those in it. The head
    is as `linear_probe` takes it, or None. A parameter that both share belongs to the head."""
    resharded(model.parameters())
    ours = set() if head is None else _find(model, head, "head")
    named: list[tuple[str, Tensor]] = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    return [(name, param) for name, param in named if id(param) not in ours], _named(named, ours)


def _split(model: nn.Module, head: Part) -> tuple[list[tuple[str, Tensor]], set[int]]:
    """All named parameters, and the identities of those in the head."""
    resharded(model.parameters())
    named: list[tuple[str, Tensor]] = list(model.named_parameters())
    ours = _find(model, head, "head")
    if all(id(param) in ours for _, param in named):
        raise ValueError("head is all of model; name the part of it that is new")
    return named, ours


def _find(model: nn.Module, part: Part, argument: str) -> set[int]:
    """The identities of the parameters of `part`."""
    items = [part] if isinstance(part, str | nn.Module) else part
    if not isinstance(items, Iterable):
        raise TypeError(f"{argument} is a {type(part).__name__}; give a module, a name, or several")
    found: set[int] = set()
    for item in items:
        if isinstance(item, nn.Module):
            found |= _of_module(model, item, argument)
        elif isinstance(item, str):
            found |= _of_name(model, item, argument)
        else:
            raise TypeError(f"{argument} has a {type(item).__name__}; give modules or names")
    if not found:
        raise ValueError(f"{argument} is empty; give a module, a name, or several")
    return found


def _of_module(model: nn.Module, module: nn.Module, argument: str) -> set[int]:
    found = {id(param) for param in module.parameters()}
    if not found:
        raise ValueError(f"{argument}: {type(module).__name__} has no parameters")
    if not found <= {id(param) for param in model.parameters()}:
        raise ValueError(f"{argument}: this {type(module).__name__} is not part of model")
    return found


def _of_name(model: nn.Module, prefix: str, argument: str) -> set[int]:
    """Compares the names as they are first. If none matches, compares them without the wrappers' parts."""
    named = list(model.named_parameters(remove_duplicate=False))
    found = {id(param) for name, param in named if f"{name}.".startswith(f"{prefix}.")}
    if not found and (bare := unwrapped(prefix, _WRAPPERS)):
        found = {id(param) for name, param in named if f"{unwrapped(name, _WRAPPERS)}.".startswith(f"{bare}.")}
    if not found:
        raise ValueError(f"{argument} names {prefix!r}, under which model has no parameter")
    return found


def _groups(model: nn.Module, freeze: bool, chosen: list[tuple[list[tuple[str, Tensor]], Options]]) -> list[Group]:
    if freeze:
        trained = {id(param): name for params, _ in chosen for name, param in params}
        for param in model.parameters():
            if id(param) in trained and not (param.is_floating_point() or param.is_complex()):
                raise ValueError(f"parameter {trained[id(param)]!r} is {param.dtype} and cannot be trained")
        for param in model.parameters():
            param.requires_grad_(id(param) in trained)
    return [{"params": params, **options} for params, options in chosen]


def _named(named: Iterable[tuple[str, Tensor]], ids: set[int]) -> list[tuple[str, Tensor]]:
    return [(name, param) for name, param in named if id(param) in ids]


def _options(options: Options | None, *reserved: str) -> Options:
    for key in ("params", "param_names", *reserved):
        if options and key in options:
            raise ValueError(f"options must not have {key!r}, which the group has already")
    return options or {}


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.startswith("bias_") or last.endswith("_bias")


def _all(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
