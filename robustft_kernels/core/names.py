"""Parameter names without what wrappers put into them."""

from collections.abc import Collection

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
