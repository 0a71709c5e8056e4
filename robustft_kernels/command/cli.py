"""The commands and their options."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from . import doctor as machine
from . import picture as pictures
from . import report
from .blends import Blend, Projection, Soup, Stock, Wise
from .opening import opened
from .output import check_file, copy_beside, new_file, new_folder
from .pairs import Pairs, pair, pair_many
from .source import Source

Command = TypeVar("Command", bound=Callable[..., None])
_PATH = click.Path(path_type=Path)
_NORMS = click.Choice(("l2", "mars"))
_NORMS_AND_ROWS = click.Choice(("l2", "mars", "mars_rows"))
_FORCE = click.option("--force", is_flag=True, help="Replace what is at the place of the output.")


def run(arguments: Sequence[str]) -> int:
    """Runs a command. Returns 0, 1 if it could not be done, or 2 if it was not understood. An error is one line."""
    try:
        return main.main(list(arguments), prog_name="robustft", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "robustft"
        return _failed(f"{error.format_message()} ({where} --help tells more)", 2)
    except click.ClickException as error:
        return _failed(error.format_message())
    except click.Abort:
        return _failed("interrupted; nothing was written")
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return _failed(str(error))
    except MemoryError:
        return _failed("there is not enough memory")


def _failed(message: str, code: int = 1) -> int:
    print(f"robustft: {' '.join(message.split())}", file=sys.stderr)
    return code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="robustft_kernels")
def main() -> None:
    """Checkpoints of fine-tuning beside the pre-trained one, and what this machine can do.

    BASE and TUNED are each a .safetensors file, the .index.json of several, a folder with either, or a state dict in a
    .pt, .pth or .bin file. Safetensors files are streamed.
    """


_BASE = click.argument("base", type=_PATH)
_SEVERAL_TUNED = click.argument("tuned", type=_PATH, nargs=-1, required=True)
_EXCLUDE = click.option(
    "--exclude",
    multiple=True,
    metavar="NAME",
    help="A tensor that stays as it is in (the first) TUNED, such as a fresh head: a name, the beginning of one, or a "
    "pattern with *. May be given several times.",
)
_OUT = click.option("--out", type=_PATH, required=True, metavar="DIR", help="The folder to write.")


def _two_checkpoints(command: Command) -> Command:
    return _BASE(click.argument("tuned", type=_PATH)(_EXCLUDE(command)))


@main.command()
@_two_checkpoints
@click.option("--norm", type=_NORMS, default="l2", show_default=True, help="mars: the largest row's sum of magnitudes.")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="How many are shown; 0: all.")
@click.option("--json", "json_file", type=_PATH, help="Write all numbers to this file.")
@click.option("--picture", type=_PATH, help="Draw the relative deviations to this file, by matplotlib.")
@_FORCE
def compare(
    base: Path,
    tuned: Path,
    exclude: tuple[str, ...],
    norm: str,
    top: int,
    json_file: Path | None,
    picture: Path | None,
    force: bool,
) -> None:
    """How far each tensor of TUNED is from BASE, the farthest first."""
    for file in filter(None, (json_file, picture)):
        check_file(file, force)
    if picture:
        pictures.check()
    with ExitStack() as stack:
        theirs, ours, pairs = _opened(stack, base, tuned, exclude)
        nbytes = sum(ours.entries[name].nbytes for name in pairs.base_of)
        bar = stack.enter_context(_bar(nbytes, "compare"))
        rows = report.measure(theirs, ours, pairs, norm, bar.update)
    total, rows = report.whole(rows, norm), report.in_order(rows)
    click.echo(report.table(rows, total, top))
    if pairs.integers or pairs.excluded:
        click.echo(f"not compared: {len(pairs.integers)} of integers, {len(pairs.excluded)} excluded")
    if json_file:
        with new_file(json_file) as made:
            made.write_text(report.as_json(rows, total, norm, (str(base), str(tuned)), pairs))
    if picture:
        with new_file(picture) as made:
            pictures.draw(rows, norm, made)


@main.command()
@_two_checkpoints
@click.option("--alpha", type=float, default=0.5, show_default=True, help="From 0 (BASE) to 1 (TUNED).")
@_OUT
@_FORCE
def wise(base: Path, tuned: Path, exclude: tuple[str, ...], alpha: float, out: Path, force: bool) -> None:
    """WiSE-FT: writes BASE + alpha (TUNED - BASE)."""
    _written(base, tuned, exclude, out, force, lambda theirs, ours, pairs: Wise(theirs, ours, pairs, alpha))


@main.command()
@_two_checkpoints
@click.option("--radius", type=float, required=True, help="The largest deviation that a tensor (or row) keeps.")
@click.option(
    "--norm",
    type=_NORMS_AND_ROWS,
    default="l2",
    show_default=True,
    help="mars: the largest row's sum of magnitudes. mars_rows: each row by itself.",
)
@_OUT
@_FORCE
def project(
    base: Path, tuned: Path, exclude: tuple[str, ...], radius: float, norm: str, out: Path, force: bool
) -> None:
    """Writes TUNED with each tensor (or row) within a radius of BASE."""
    _written(
        base, tuned, exclude, out, force, lambda theirs, ours, pairs: Projection(theirs, ours, pairs, radius, norm)
    )


@main.command()
@_SEVERAL_TUNED
@_EXCLUDE
@_OUT
@_FORCE
def soup(tuned: tuple[Path, ...], exclude: tuple[str, ...], out: Path, force: bool) -> None:
    """A uniform soup: writes the mean of two or more TUNED. What is no weight is that of the first."""
    _check_several(tuned)
    with ExitStack() as stack:
        sources = _all_opened(stack, tuned)
        blend = Soup(sources, pair_many(sources, None, exclude))
        copied = _write(stack, sources, blend, out, force)
    _tell(out, sources[0], blend, copied, "the first TUNED")


@main.command()
@_BASE
@_SEVERAL_TUNED
@_EXCLUDE
@click.option("--json", "json_file", type=_PATH, help="Write the t of each tensor to this file.")
@_OUT
@_FORCE
def stock(
    base: Path, tuned: tuple[Path, ...], exclude: tuple[str, ...], json_file: Path | None, out: Path, force: bool
) -> None:
    """Model Stock: writes BASE + t (the mean of two or more TUNED - BASE).

    Each tensor has its own t, from the angle between the ways that it moved.
    """
    _check_several(tuned)
    if json_file:
        check_file(json_file, force)
    with ExitStack() as stack:
        theirs, *sources = _all_opened(stack, (base, *tuned))
        pairs = pair_many(sources, theirs, exclude)
        blend = Stock(sources, theirs, pairs)
        copied = _write(stack, [*sources, theirs], blend, out, force)
    click.echo(report.ratios_told(blend.ratios))
    _tell(out, sources[0], blend, copied, "the first TUNED")
    if json_file:
        with new_file(json_file) as made:
            made.write_text(report.ratios_as_json(blend.ratios, str(base), list(map(str, tuned)), pairs[0]))


@main.command()
def doctor() -> None:
    """Versions, backends, and how long a small step takes here."""
    for line in machine.report():
        click.echo(line)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One core keeps up with the disk. Threads that wait for each other after each span are slow where others run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _opened(stack: ExitStack, base: Path, tuned: Path, exclude: tuple[str, ...]) -> tuple[Source, Source, Pairs]:
    theirs, ours = _all_opened(stack, (base, tuned))
    return theirs, ours, pair(theirs, ours, exclude)


def _all_opened(stack: ExitStack, paths: Iterable[Path]) -> list[Source]:
    stack.enter_context(_one_thread())
    return [stack.enter_context(opened(path)) for path in paths]


def _check_several(tuned: Sequence[Path]) -> None:
    if len(tuned) < 2:
        raise click.UsageError("give two or more TUNED; between BASE and one there is `robustft wise`")
    if len({path.resolve() for path in tuned}) < len(tuned):
        raise click.UsageError("a TUNED is given twice; each counts once")


def _written(
    base: Path,
    tuned: Path,
    exclude: tuple[str, ...],
    out: Path,
    force: bool,
    make: Callable[[Source, Source, Pairs], Blend],
) -> None:
    """Writes TUNED to a folder with the values of a blend."""
    with ExitStack() as stack:
        theirs, ours, pairs = _opened(stack, base, tuned, exclude)
        blend = make(theirs, ours, pairs)
        copied = _write(stack, [ours, theirs], blend, out, force)
    _tell(out, ours, blend, copied, "TUNED")


def _write(stack: ExitStack, sources: Sequence[Source], blend: Blend, out: Path, force: bool) -> list[str]:
    """Writes the first source with the values of a blend, and copies what lies beside it. Returns the names of that.
    The folder appears when the stack is left."""
    ours = sources[0]
    folder = stack.enter_context(new_folder(out, sources, ours.nbytes, force))
    copied = copy_beside(ours, folder)
    bar: Any = stack.enter_context(_bar(ours.nbytes, str(out)))
    ours.write(folder, blend, bar.update)
    return copied


def _tell(out: Path, ours: Source, blend: Blend, copied: list[str], label: str) -> None:
    kept = len(ours.entries) - blend.changed
    click.echo(f"{out}: {blend.changed} tensors changed, {kept} as in {label}; {len(copied)} other files copied")


def _bar(nbytes: int, what: str) -> Any:
    """A bar of bytes on stderr, if that is a terminal."""
    return tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, disable=None)
