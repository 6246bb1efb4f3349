"""Cases in child processes, so that a crash or an endless loop is counted and the run goes on."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.coverage import rivals
from benchmarks.coverage.case import Case, all_cases
from benchmarks.coverage.check import check, check_rival
from benchmarks.coverage.result import Result, Stage

# Imported once by the server that the children are forked from.
_PRELOADED = ("benchmarks.coverage.check", "transformers.modeling_utils", "torchvision", "timm")


def results(
    cases: Sequence[Case], *, jobs: int, limit: float, timings: int = 3
) -> Iterator[Result]:
    """The result of each case, in order.

    Args:
        cases: of the zoo; the children find them again by name.
        jobs: children at a time, each on one thread.
        limit: seconds a stage may take before it counts as hanging; a rival gets a third.
        timings: maps made for the time alone.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    present = [name for name in _PRELOADED if find_spec(name.partition(".")[0])]
    context.set_forkserver_preload(present)
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda case: _result(case.name, limit, timings), cases)


def _result(name: str, limit: float, timings: int) -> Result:
    """Our stages in one child, each rival in another, since one may hang."""
    result = isolated(partial(_check_by_name, timings), name, limit)
    for rival in rivals.installed():
        other = isolated(partial(_check_rival_by_name, rival), name, limit / 3)
        result.stages[rival] = other.stages.get(rival) or other.stages["build"]
    return result


def isolated(work: Callable[[str, Connection], None], name: str, limit: float) -> Result:
    """Run work on a case in a child; what it sent last is what is known if it dies or hangs.

    Args:
        work: sends ``(stage, result)`` as each stage begins and ``("", result)`` at the end.
        name: of the case.
        limit: seconds without a message before the child is stopped.
    """
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(name, sender), daemon=True)
    child.start()
    sender.close()
    result, stage = Result(name), "build"
    try:
        while stage:
            if not receiver.poll(limit):
                result.stages[stage] = Stage("hang", f"no end within {limit:.0f} s", limit)
                break
            stage, result = receiver.recv()
    except EOFError:
        child.join()
        reason = f"the process ended with code {child.exitcode}"
        result.stages[stage] = Stage("crash", reason)
    finally:
        if child.is_alive():
            child.kill()
        child.join()
        receiver.close()
    return result


def _check_by_name(timings: int, name: str, sender: Connection) -> None:
    _quiet()
    [case] = [case for case in all_cases() if case.name == name]

    def notify(stage: str, result: Result) -> None:
        sender.send((stage, result))

    sender.send(("", check(case, notify, timings=timings)))


def _check_rival_by_name(rival: str, name: str, sender: Connection) -> None:
    _quiet()
    [case] = [case for case in all_cases() if case.name == name]
    sender.send((rival, Result(name)))
    sender.send(("", Result(name, {rival: check_rival(case, rival)})))


def _quiet() -> None:
    """Progress bars and advice of other libraries are no part of the result."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    devnull: Any = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
