"""A run continues after any end, and nobody can tell from its result that there was one."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import training.run.run_folder
from service.model.atomic_file import WriteError
from service.model.checkpoint import load_checkpoint, save_checkpoint
from service.model.network import Network
from tests.training.tiny_run import TINY
from training.data.dataset import Source
from training.errors import Interrupted, RunError
from training.run.run_folder import CHECKPOINT_FILE, read_log
from training.run.state import STATE_FILE, TrainingState, load_state, save_state
from training.train import RunOptions, train

STEPS = 6  # of an epoch: 108 of the 120 images are kept, the batch is 16


def assert_same_run(folder: Path, expected: Path) -> None:
    """The weights are equal to the bit, and so is every epoch of the log but its time."""
    weights = load_checkpoint(folder / CHECKPOINT_FILE).weights
    for name, value in load_checkpoint(expected / CHECKPOINT_FILE).weights.items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)
    rows, expected_rows = read_log(folder), read_log(expected)
    assert [row | {"elapsed_s": 0} for row in rows] == [row | {"elapsed_s": 0} for row in expected_rows]


@contextmanager
def at_step(number: int, act: Callable[[], Any]) -> Iterator[None]:
    """Act in the middle of step ``number`` (from 0) of the run inside the block."""
    seen = 0

    def hook(module: nn.Module, _inputs: Any, _output: Any) -> None:
        nonlocal seen
        if isinstance(module, Network) and module.training:
            if seen == number:
                act()
            seen += 1

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def crash() -> None:
    raise MemoryError("a crash in the middle of a step")


def assert_continues(run: Callable[[RunOptions], Any], folder: Path) -> RunOptions:
    """A run that SIGINT stopped in a step ends, when it is called again, as one that was left alone; give its options."""
    run(RunOptions(folder / "alone"))
    stopped = RunOptions(folder / "stopped")
    with at_step(8, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(Interrupted):
        run(stopped)
    run(stopped)
    assert_same_run(folder / "stopped", folder / "alone")
    return stopped


@pytest.mark.parametrize("step", [0, 8, 6 * STEPS - 1], ids=["first", "inside", "last"])
def test_ctrl_c_saves_and_the_run_continues_to_the_same_result(
    step: int, source: Source, finished_run: Path, tmp_path: Path
) -> None:
    """SIGINT in a step ends the run after that step, and calling it again ends as if nothing had been."""
    with at_step(step, lambda: signal.raise_signal(signal.SIGINT)), pytest.raises(Interrupted, match="saved"):
        train(TINY, source, RunOptions(tmp_path))
    train(TINY, source, RunOptions(tmp_path))
    assert_same_run(tmp_path, finished_run)


def test_a_crash_costs_at_most_an_epoch(source: Source, finished_run: Path, tmp_path: Path) -> None:
    """A run that died in the middle of an epoch continues from its beginning, to the same result."""
    with at_step(2 * STEPS + 3, crash), pytest.raises(MemoryError):
        train(TINY, source, RunOptions(tmp_path))
    assert len(read_log(tmp_path)) == 2
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert (state["epoch"], state["step"]) == (2, 0)
    train(TINY, source, RunOptions(tmp_path))
    assert_same_run(tmp_path, finished_run)


def test_a_kill_between_checkpoint_and_state_changes_nothing(source: Source, finished_run: Path, tmp_path: Path) -> None:
    """The checkpoint may be one epoch ahead of the state; the state decides, and the epoch is written again."""
    with at_step(3 * STEPS, crash), pytest.raises(MemoryError):
        train(TINY, source, RunOptions(tmp_path))
    ahead = load_checkpoint(finished_run / CHECKPOINT_FILE)
    save_checkpoint(tmp_path / CHECKPOINT_FILE, ahead.weights, ahead.metadata)
    train(TINY, source, RunOptions(tmp_path))
    assert_same_run(tmp_path, finished_run)


def test_a_finished_run_is_only_measured_again(source: Source, tmp_path: Path, finished_run: Path) -> None:
    """Continuing a run that is at its end makes no step and leaves the same weights."""
    for name in (STATE_FILE, CHECKPOINT_FILE):
        (tmp_path / name).write_bytes((finished_run / name).read_bytes())
    with at_step(0, crash):
        train(TINY, source, RunOptions(tmp_path, model_name="tiny"))
    weights = load_checkpoint(tmp_path / CHECKPOINT_FILE).weights
    for name, value in load_checkpoint(finished_run / CHECKPOINT_FILE).weights.items():
        np.testing.assert_array_equal(weights[name], value)


def test_images_that_were_sorted_anew_are_another_run(source: Source, tmp_path: Path, finished_run: Path) -> None:
    """The folder of the finished run is not taken for theirs, however many they are."""
    (tmp_path / STATE_FILE).write_bytes((finished_run / STATE_FILE).read_bytes())
    sorted_anew = replace(source.train, labels=source.train.labels.roll(1))
    with pytest.raises(RunError, match="another set of images; choose another --out"):
        train(TINY, replace(source, train=sorted_anew), RunOptions(tmp_path))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, r"seed \(0, now 1\)"), ({"recipe": replace(TINY, epochs=7)}, r"recipe: epochs \(6, now 7\)")],
)
def test_a_folder_of_another_run_is_refused(
    change: dict[str, Any], named: str, source: Source, tmp_path: Path, finished_run: Path
) -> None:
    """A run never continues one with another recipe or seed; the message names what differs."""
    (tmp_path / STATE_FILE).write_bytes((finished_run / STATE_FILE).read_bytes())
    with pytest.raises(RunError, match=f"another {named}; choose another --out"):
        train(change.get("recipe", TINY), source, RunOptions(tmp_path, seed=change.get("seed", 0)))


def test_a_state_is_not_saved_after_every_short_epoch(
    source: Source, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the time between two saves a crash costs the epochs since the last one, and the result is the same."""
    monkeypatch.setattr(training.run.run_folder, "SAVE_EVERY_S", 3600.0)
    with at_step(2 * STEPS + 3, crash), pytest.raises(MemoryError):
        train(TINY, source, RunOptions(tmp_path))
    assert not (tmp_path / STATE_FILE).exists()
    train(TINY, source, RunOptions(tmp_path))
    assert_same_run(tmp_path, finished_run)


@pytest.mark.parametrize("damage", [b"", b"not a state", b"PK\3\4 cut short"])
def test_a_damaged_state_is_named_and_kept(damage: bytes, tmp_path: Path) -> None:
    """Whatever is wrong with the state file, the error says which file to remove, and it is not overwritten."""
    (tmp_path / STATE_FILE).write_bytes(damage)
    with pytest.raises(RunError, match=STATE_FILE):
        load_state(tmp_path, {})
    assert (tmp_path / STATE_FILE).read_bytes() == damage


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """Let every write beyond ``limit_bytes`` of a file fail, as it does on a disk without space."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_state(tmp_path: Path, finished_run: Path) -> None:
    """When the state cannot be written whole, the error says so, the old one stays, and nothing is left beside it."""
    weights = load_checkpoint(finished_run / CHECKPOINT_FILE).weights
    state = TrainingState({}, model={name: torch.from_numpy(value).float() for name, value in weights.items()})
    save_state(tmp_path, TrainingState({}, epoch=3))
    before = (tmp_path / STATE_FILE).read_bytes()
    with full_disk(30_000), pytest.raises(WriteError, match="cannot write"):
        save_state(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]
    assert (tmp_path / STATE_FILE).read_bytes() == before


def test_a_finished_run_keeps_no_weights_in_its_state(finished_run: Path) -> None:
    """The checkpoint has the weights, and no optimiser is needed any more: some kilobytes are left."""
    state = load_state(finished_run, {})
    assert state is not None, "the run left a state"
    assert (state.model, state.optimizers, state.epoch) == ({}, [], 6)
    assert (finished_run / STATE_FILE).stat().st_size < 20_000


def test_patience_ends_the_run_and_keeps_the_best_epoch(source: Source, tmp_path: Path) -> None:
    """Without a better epoch the run stops, and its checkpoint is the best one's; called again, it makes no step."""
    impatient = replace(TINY, epochs=40, patience=2)
    train(impatient, source, RunOptions(tmp_path))
    rows = read_log(tmp_path)
    best = max(rows, key=lambda row: (row["val_balanced_accuracy"], -row["val_loss"]))
    assert len(rows) == best["epoch"] + 2 < 40
    metrics = load_checkpoint(tmp_path / CHECKPOINT_FILE).metadata.metrics
    assert (metrics["epochs_done"], metrics["val_accuracy"]) == (best["epoch"], best["val_accuracy"])
    with at_step(0, crash):
        train(impatient, source, RunOptions(tmp_path))


def test_a_run_with_patience_continues_to_the_same_result(source: Source, tmp_path: Path) -> None:
    """The best epoch is remembered over an interruption."""
    assert_continues(lambda options: train(replace(TINY, epochs=40, patience=2), source, options), tmp_path)


def test_a_full_disk_leaves_no_checkpoint(tmp_path: Path, finished_run: Path) -> None:
    """When the checkpoint cannot be written whole, nothing is left of it."""
    checkpoint = load_checkpoint(finished_run / CHECKPOINT_FILE)
    with full_disk(30_000), pytest.raises(WriteError, match="cannot write"):
        save_checkpoint(tmp_path / CHECKPOINT_FILE, checkpoint.weights, checkpoint.metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_run_continues_when_there_is_space_again(source: Source, finished_run: Path, tmp_path: Path) -> None:
    """A run that stopped for want of space leaves no part of a file, and ends as if nothing had been."""
    with full_disk(30_000), pytest.raises(WriteError, match="cannot write"):
        train(TINY, source, RunOptions(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    train(TINY, source, RunOptions(tmp_path))
    assert_same_run(tmp_path, finished_run)


def start(data: Path, out: Path, *device: str) -> subprocess.Popen[bytes]:
    command = ["train", "--recipe", "tiny", "--data", str(data), "--out", str(out), "--device", *(device or ["cpu"])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.tiny_run", *command],
        env=os.environ | {"TQDM_MININTERVAL": "0"},  # the bar is written after every step
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def send_after(process: subprocess.Popen[bytes], steps: int, number: signal.Signals) -> bytes:
    """Send a signal once the bar has been written ``steps`` times; give what the process wrote until its end."""
    assert process.stderr is not None, "it is a pipe"
    written = b""
    with process, process.stderr:
        while written.count(b"\r") < steps and (part := os.read(process.stderr.fileno(), 4096)):
            written += part
        process.send_signal(number)
        return written + process.stderr.read()


@pytest.mark.slow
def test_sigkill_at_random_moments_does_not_change_the_result(data_folder: Path, tmp_path: Path) -> None:
    """A run that is killed again and again ends with the weights of one that was left alone, to the bit."""
    with start(data_folder, tmp_path / "alone") as process:
        process.communicate()
    assert process.returncode == 0
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    for _ in range(3):
        process = start(data_folder, tmp_path / "killed")
        send_after(process, rng.randint(1, 25), signal.SIGKILL)
    with start(data_folder, tmp_path / "killed") as process:
        process.communicate()
    assert process.returncode == 0, f"seed {seed}"
    assert_same_run(tmp_path / "killed", tmp_path / "alone")


@pytest.mark.gpu
def test_a_deterministic_run_on_a_gpu_continues_to_the_same_result(data_folder: Path, tmp_path: Path) -> None:
    """With ``--deterministic`` a run on a GPU that was killed ends with the weights of one that was left alone, too."""
    device = ("cuda", "--deterministic")
    with start(data_folder, tmp_path / "alone", *device) as process:
        process.communicate()
    assert process.returncode == 0
    send_after(start(data_folder, tmp_path / "killed", *device), 15, signal.SIGKILL)
    with start(data_folder, tmp_path / "killed", *device) as process:
        process.communicate()
    assert process.returncode == 0
    assert_same_run(tmp_path / "killed", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_program_with_130(number: signal.Signals, data_folder: Path, tmp_path: Path) -> None:
    """The program says how to go on, exits with 130, and has saved the step it was in."""
    process = start(data_folder, tmp_path)
    said = send_after(process, 9, number)
    assert process.returncode == 130
    assert b"or --out" in said
    state = load_state(tmp_path, {})
    assert state is not None, "a state was saved"
    assert (state.epoch, state.step) > (0, 0)
