"""The command line: ``neuroexapt demo`` and the commands on models, runs and checkpoints."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree
from torch import nn

from neuroexapt.couple import AxisMap, Pinned, Width, map_axes
from neuroexapt.errors import NeuroExaptError, SettingsError
from neuroexapt.record import find_journal, load, read_journal, read_runs, write_report
from neuroexapt.record.compare import FIGURES, as_data, figures, recorded
from neuroexapt.record.story import read_story

app = typer.Typer(
    help="Change a PyTorch model's architecture while it trains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True)
_WHOLE_LINES = 10_000


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(help="Repetitions, each with its own split.")] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each arm.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for journals and reports.")] = Path(
        "neuroexapt-demo"
    ),
) -> None:
    """Train a CNN on handwritten digits twice: as it is, and evolving."""
    from neuroexapt import demo as digits

    try:
        digits.run(seeds=seeds, epochs=epochs, out=out, console=console)
    except NeuroExaptError as error:
        raise _stop(error) from error


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or its journal.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="Another run to draw beside it; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="HTML file; else report.html beside the journal.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading; else the run's name.")] = None,
) -> None:
    """Write a run, finished or under way, as one HTML file that needs nothing else."""
    try:
        (name, events), *others = read_runs([run, *(against or [])]).items()
        target = out or find_journal(run).parent / "report.html"
        named = {"name": name} if others else {}
        path = write_report(events, target, title=title or name, against=dict(others), **named)
    except NeuroExaptError as error:
        raise _stop(error) from error
    console.print(str(path), soft_wrap=True, markup=False, highlight=False)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or their journals.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show runs, and the baselines in them, beside each other; differences are to the first."""
    try:
        stories = [read_story(events, name) for name, events in read_runs(runs).items()]
    except NeuroExaptError as error:
        raise _stop(error) from error
    found = figures(stories)
    if as_json:
        console.print_json(json.dumps(as_data(found)))
        return
    grid = Table()
    for title in ("", *(escape(one.name) for one in found)):
        grid.add_column(title, justify="right" if title else "left", overflow="fold")
    for name in recorded(found):
        cells = [f"{one.told(name)}\n[dim]{one.against(found[0], name)}[/]" for one in found]
        grid.add_row(FIGURES[name][0], *(cell.removesuffix("\n[dim][/]") for cell in cells))
    console.print(grid)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="package.module:factory")],
    input: Annotated[
        list[str], typer.Option(help="Shape of an input, 1,3,32,32; integers: int:1,16")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a model's widths, what each ties together, and what is pinned and why."""
    try:
        axes = map_axes(_build(model), tuple(_example(text) for text in input))
    except NeuroExaptError as error:
        raise _stop(error) from error
    if as_json:
        console.print_json(json.dumps(_as_json(axes)))
    else:
        _show(axes)


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its journal.")],
) -> None:
    """Derive every decision of a run again from its journal alone, and compare."""
    from neuroexapt.record.replay import replay as derive
    from neuroexapt.record.schema import problems

    try:
        events = read_journal(find_journal(run))
        for problem in problems(events):
            console.print(f"note: {escape(problem)}", soft_wrap=True)
        found = derive(events)
    except NeuroExaptError as error:
        raise _stop(error) from error
    if found.difference is not None:
        errors.print(f"[bold red]differs[/] {escape(found.difference)}", soft_wrap=True)
        raise typer.Exit(1)
    console.print(f"{found.calls} calls, {found.decisions} of them decisions: all as written")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A checkpoint, or a folder of them.")],
    model: Annotated[str, typer.Option(help="package.module:factory of the first model")],
    to: Annotated[str, typer.Option(help="python, program, onnx or pretrained")],
    out: Annotated[Path, typer.Option(help="The file, or for pretrained the folder.")],
    input: Annotated[
        list[str] | None,
        typer.Option(help="For program and onnx: shape of an input, 1,3,32,32; integers: int:1,16"),
    ] = None,
) -> None:
    """Write the model of a checkpoint so that it needs this library no more."""
    from neuroexapt.record import export as writers

    args = tuple(_example(text) for text in input or ())
    try:
        if to not in ("python", "program", "onnx", "pretrained"):
            raise SettingsError(
                "--to",
                seen=to,
                needed="python, program, onnx or pretrained",
                next_step="try --to python",
            )
        if to in ("program", "onnx") and not args:
            raise SettingsError(
                "--input",
                seen="none",
                needed=f"an example input for --to {to}",
                next_step="try --input 1,3,32,32",
            )
        evolved = load(lambda: _build(model), run)
        if to == "python":
            made = " and ".join(str(path) for path in writers.write_python(evolved, out))
        elif to == "pretrained":
            made = str(writers.write_pretrained(evolved, out))
        else:
            write = writers.write_program if to == "program" else writers.write_onnx
            made = str(write(evolved, out, args))
    except NeuroExaptError as error:
        raise _stop(error) from error
    console.print(f"wrote {escape(made)}", soft_wrap=True)


def _stop(error: NeuroExaptError) -> typer.Exit:
    errors.print(
        f"[bold red]{type(error).__name__}[/] {escape(str(error))}", soft_wrap=True, emoji=False
    )
    return typer.Exit(1)


def _build(target: str) -> nn.Module:
    module_name, _, factory_name = target.partition(":")
    # A command started by its script does not see the folder it is started in.
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            target,
            seen=str(error),
            needed="package.module:factory, importable from here",
            next_step="check the spelling; the factory is a function or class without arguments",
        ) from error
    try:
        model = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise SettingsError(
            target,
            seen=f"{type(error).__name__}: {error}",
            needed="a factory that builds the model without arguments",
            next_step="write a function without arguments that returns the model, and name that",
        ) from error
    if not isinstance(model, nn.Module):
        raise SettingsError(
            target,
            seen=f"a {type(model).__name__}",
            needed="a factory that returns a torch.nn.Module",
            next_step="name the function or class that builds the model",
        )
    return model


def _example(text: str) -> torch.Tensor:
    """``1,3,32,32`` is a float tensor, ``int:1,16`` an integer one (zeros)."""
    kind, _, shape = text.rpartition(":")
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError as error:
        raise SettingsError(
            "--input", seen=text, needed="sizes with commas", next_step="try --input 1,3,32,32"
        ) from error
    if any(size < 1 for size in sizes):
        raise SettingsError(
            "--input", seen=text, needed="sizes of 1 or more", next_step="try --input 1,3,32,32"
        )
    if kind not in ("", "int", "float"):
        raise SettingsError(
            "--input",
            seen=text,
            needed="int: or float: before the sizes",
            next_step="try --input int:1,16",
        )
    return torch.zeros(sizes, dtype=torch.long) if kind == "int" else torch.randn(sizes)


def _as_json(axes: AxisMap) -> dict[str, Any]:
    def entry(item: Width | Pinned) -> dict[str, Any]:
        places = [
            {"tensor": p.tensor, "dim": p.dim, "roles": sorted(p.roles)} for p in item.appearances
        ]
        return {"size": item.size, "appearances": places}

    return {
        "widths": {
            name: {**entry(w), "mixed_by": sorted({m.kind for m in w.mixers})}
            for name, w in axes.widths.items()
        },
        "pinned": {name: {**entry(p), "reason": p.reason} for name, p in axes.pinned.items()},
        "unknown": {op: list(paths) for op, paths in axes.unknown.items()},
        "notes": list(axes.notes),
    }


def _show(axes: AxisMap) -> None:
    """A tree: every width with what it ties together, every pin with its reason."""
    widths = Tree("[bold]widths[/]: what can change, and what changes with it")
    for width in axes.widths.values():
        node = widths.add(f"[bold]{escape(width.name)}[/]  {width.size}")
        for title, role in (("made by", "producer"), ("read by", "consumer")):
            _add(node, title, _places(width, role))
        _add(node, "also in", _places(width, "elementwise"))
        _add(node, "mixed by", sorted({mixer.kind for mixer in width.mixers}))
    pins = Tree("[bold]pinned[/]: what cannot change, and why")
    for pin in axes.pinned.values():
        # Every convolution has two kernel dimensions; they say nothing about this model.
        if not pin.reason.startswith("a kernel size"):
            pins.add(f"[bold]{escape(pin.name)}[/]  {pin.size}  {escape(pin.reason)}")
    # A pipe or a file gets whole lines, for grep; a terminal gets them folded.
    printer = console if console.is_terminal else Console(width=_WHOLE_LINES)
    for tree in (widths, pins):
        printer.print(tree, emoji=False)
    for op, paths in axes.unknown.items():
        console.print(f"no rule for {escape(op)}, called in: {escape(', '.join(paths))}")
    for note in axes.notes:
        console.print(f"note: {escape(note)}")


def _add(node: Tree, title: str, items: list[str]) -> None:
    if items:
        node.add(f"{title} {escape(', '.join(items))}")


def _places(width: Width, role: str) -> list[str]:
    return [f"{p.tensor}[{p.dim}]" for p in width.appearances if role in p.roles]
