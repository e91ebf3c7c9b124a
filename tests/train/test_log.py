import io
import json
from pathlib import Path

import torch
from rich.console import Console

from eri.train import Log, Pending, StepNumbers, cut, say


def pending(step: int) -> Pending:
    return Pending(step, ("a.png", "b.png"), 1e-4, list, torch.zeros(0), None)


def screen() -> Console:
    return Console(file=io.StringIO(), width=200)


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def run(path: Path, console: Console, first: int, last: int) -> None:
    with Log(path, steps=40, step=first, console=console) as log:
        for step in range(first + 1, last + 1):
            numbers = StepNumbers(loss=0.5, grad_norm=0.1, samples=2)
            log.step(pending(step), numbers, lr=1e-4, seconds=0.5)


def test_one_object_a_step(tmp_path: Path) -> None:
    run(tmp_path / "log.jsonl", screen(), 0, 3)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["files"] == ["a.png", "b.png"]
    assert (lines[0]["images_per_second"], lines[0]["lr"]) == (4.0, 1e-4)


def test_a_norm_that_overflowed_is_null_because_json_has_no_infinity(tmp_path: Path) -> None:
    with Log(tmp_path / "log.jsonl", steps=2, step=0, console=screen()) as log:
        for step, norm in enumerate((float("inf"), float("nan")), start=1):
            numbers = StepNumbers(loss=0.5, grad_norm=norm, samples=2)
            log.step(pending(step), numbers, lr=1e-4, seconds=0.5)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] for line in lines] == [None, None]
    assert "Infinity" not in (tmp_path / "log.jsonl").read_text()


def test_without_a_terminal_progress_is_plain_lines_now_and_then(tmp_path: Path) -> None:
    console = screen()
    run(tmp_path / "log.jsonl", console, 0, 40)
    lines = told(console).splitlines()
    assert lines[0].startswith("step 1/40  loss 0.5000  4.00 images/s  0:00:20 left")
    assert 20 <= len(lines) <= 22
    assert lines[-1].startswith("step 40/40")


def test_the_time_left_counts_this_sessions_steps_only(tmp_path: Path) -> None:
    console = screen()
    run(tmp_path / "log.jsonl", console, 38, 39)
    assert "0:00:00 left" in told(console) or "0:00:01 left" in told(console)


def test_the_speed_of_a_session_is_its_median(tmp_path: Path) -> None:
    with Log(tmp_path / "log.jsonl", steps=40, step=0, console=screen()) as log:
        numbers = StepNumbers(loss=0.5, grad_norm=0.1, samples=2)
        for step, seconds in enumerate((9.0, 0.5, 0.5, 0.5), start=1):
            log.step(pending(step), numbers, lr=1e-4, seconds=seconds)
        assert log.images_per_second is None  # too few steps to tell
        log.step(pending(5), numbers, lr=1e-4, seconds=0.25)
        assert log.images_per_second == 4.0


def test_resuming_cuts_what_comes_again_and_what_a_crash_tore(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    run(path, screen(), 0, 4)
    path.write_text(path.read_text() + '{"step": 5, "lo')
    cut(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    cut(tmp_path / "absent.jsonl", 2)


def test_what_is_said_is_text_and_nothing_else() -> None:
    console = screen()
    say(console, "[red]\x1b[31m{}[/x]")
    assert told(console) == "[red]\\x1b[31m{}[/x]\n"
