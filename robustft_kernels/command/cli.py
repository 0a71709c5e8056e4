"""The commands and their options."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from . import doctor as machine
from . import picture as pictures
from . import report
from .blends import Blend, Projection, Wise
from .opening import opened
from .output import check_file, copy_beside, new_file, new_folder
from .pairs import Pairs, pair
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


def _two_checkpoints(command: Command) -> Command:
    exclude = click.option(
        "--exclude",
        multiple=True,
        metavar="NAME",
        help="A tensor that stays as it is in TUNED, such as a fresh head: a name, the beginning of one, or a pattern "
        "with *. May be given several times.",
    )
    for decorate in (exclude, click.argument("tuned", type=_PATH), click.argument("base", type=_PATH)):
        command = decorate(command)
    return command


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
@click.option("--out", type=_PATH, required=True, metavar="DIR", help="The folder to write.")
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
@click.option("--out", type=_PATH, required=True, metavar="DIR", help="The folder to write.")
@_FORCE
def project(
    base: Path, tuned: Path, exclude: tuple[str, ...], radius: float, norm: str, out: Path, force: bool
) -> None:
    """Writes TUNED with each tensor (or row) within a radius of BASE."""
    _written(
        base, tuned, exclude, out, force, lambda theirs, ours, pairs: Projection(theirs, ours, pairs, radius, norm)
    )


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
    stack.enter_context(_one_thread())
    theirs, ours = stack.enter_context(opened(base)), stack.enter_context(opened(tuned))
    return theirs, ours, pair(theirs, ours, exclude)


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
        folder = stack.enter_context(new_folder(out, (theirs, ours), ours.nbytes, force))
        copied = copy_beside(ours, folder)
        bar: Any = stack.enter_context(_bar(ours.nbytes, str(out)))
        ours.write(folder, blend, bar.update)
    kept = len(ours.entries) - blend.changed
    click.echo(f"{out}: {blend.changed} tensors changed, {kept} as in TUNED; {len(copied)} other files copied")


def _bar(nbytes: int, what: str) -> Any:
    """A bar of bytes on stderr, if that is a terminal."""
    return tqdm(total=nbytes, desc=what, unit="B", unit_scale=True, disable=None)
