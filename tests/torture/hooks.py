"""What is done to a forked session before its command begins: slow, failing, signalled, unheard."""

import builtins
import importlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from eri.run.saves import Saves

__all__ = ["fail", "give_nan", "kill_workers", "lose", "outgrow", "send", "slow", "turn_back"]


def slow(*targets: tuple[str, float]) -> None:
    """Functions, such as `os.fsync`, that take so many seconds longer."""
    for target, seconds in targets:
        _before(target, lambda seconds=seconds: time.sleep(seconds))


def fail(target: str, error: str, *message: Any) -> None:
    """A function that raises, such as `torch.OutOfMemoryError`."""
    kind = _found(error)[2] if "." in error else getattr(builtins, error)

    def refuse() -> None:
        raise kind(*message)

    _before(target, refuse)


def send(target: str, number: int) -> None:
    """A function in which the session gets a signal."""
    _before(target, lambda: os.kill(os.getpid(), number))


def give_nan(target: str) -> None:
    """A function that returns NaN."""
    owner, name, right = _found(target)
    setattr(owner, name, lambda *given, **named: right(*given, **named) * torch.nan)


def outgrow(step: int, number: float) -> None:
    """An adapter of which one number is this when a step is saved."""
    save = Saves.save

    def saved(saves: Saves, state: Any, adapter: Any, **more: Any) -> None:
        if state.step == step:
            state.flat.master[0] = number
        save(saves, state, adapter, **more)

    Saves.save = saved  # type: ignore[method-assign]


def kill_workers() -> None:
    """Processes that read samples ahead, killed at every step."""

    def kill() -> None:
        for child in multiprocessing.active_children():
            child.kill()

    _before("eri.train.step.Step.__call__", kill)


def turn_back(seconds: float) -> None:
    """A clock that is that much behind."""
    now = time.time
    time.time = lambda: now() - seconds
    time.time_ns = lambda: int(time.time() * 1e9)


def lose(number: int, way: str) -> None:
    """A standard stream that is closed, whose reader has left, or whose disk is full."""
    if way == "closed":
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
        return
    if way == "no reader":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    os.dup2(write, number)
    os.close(write)


def _before(target: str, call: Callable[[], object]) -> None:
    owner, name, right = _found(target)

    def wrapped(*given: Any, **named: Any) -> Any:
        call()
        return right(*given, **named)

    setattr(owner, name, wrapped)


def _found(target: str) -> tuple[Any, str, Any]:
    """The module or class that has a name, the name, and what it stands for."""
    path, _, name = target.rpartition(".")
    parts, owner = path.split("."), None
    for count in range(len(parts), 0, -1):
        try:
            owner = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            owner = getattr(owner, part)
        break
    return owner, name, getattr(owner, name)
