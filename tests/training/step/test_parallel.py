"""Two processes train as one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from service.model.layers import in_order
from tests.training.tiny_run import TINY
from training.errors import RunError
from training.run.run_folder import read_log
from training.run.state import STATE_FILE
from training.step.images_last import use_images_last
from training.step.network import build_model
from training.step.parallel import Parallel, open_parallel
from training.step.synced_norm import SyncedBatchNorm, use_synced_norms


def start(processes: int, recipe: str, data: Path, out: Path, *extra: str) -> subprocess.Popen[str]:
    """Start the training program in that many processes, by torchrun if there is more than one."""
    program = ["-m", "tests.training.tiny_run", "train", "--recipe", recipe, "--data", str(data), "--out", str(out)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, *program, "--device", "cpu", *extra],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what a failed test leaves can be ended as one group
    )


def run(processes: int, recipe: str, data: Path, out: Path, *extra: str) -> str:
    """Run to the end; give what was printed."""
    process = start(processes, recipe, data, out, *extra)
    try:
        said, _ = process.communicate(timeout=300)
    finally:
        end_group(process)
    assert process.returncode == 0, said
    return said


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what is printed up to ``text``, which comes before the end."""
    assert process.stdout is not None, "it is a pipe"
    written = ""
    while text not in written:
        part = process.stdout.read(1)
        assert part, written
        written += part
    return written


def end_group(process: subprocess.Popen[str]) -> None:
    """End every process of the group that is still there."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
def test_two_processes_have_the_loss_curve_of_one(data_folder: Path, tmp_path: Path) -> None:
    """With the same recipe and the same batch in all, losses agree, in the first epoch to five digits; only rounding differs.

    Nothing is left out to make it so: images are augmented and mixed, and batch norms see the whole batch.
    """
    said = run(2, "tiny_smooth", data_folder, tmp_path / "two")
    run(1, "tiny_smooth", data_folder, tmp_path / "one")
    assert said.count("serve: ") == 1, "only one process tells the result"
    assert "run_left=" in said, "the bar tells the time that all epochs still take"
    two, one = read_log(tmp_path / "two"), read_log(tmp_path / "one")
    assert len(two) == len(one) == 6
    for name in ("train_loss", "val_loss"):
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-5)
        for ours, alone in zip(two, one, strict=True):  # each step makes the last one's rounding larger
            assert ours[name] == pytest.approx(alone[name], rel=2e-2), (name, ours["epoch"])
        assert two[-1][name] < 0.7 * two[0][name], "a curve that stays where it began would show little"


@pytest.mark.slow
def test_two_processes_fine_tune_as_one_does(data_folder: Path, finished_run: Path, tmp_path: Path) -> None:
    """Also where the head learns alone at first, and all layers after it."""
    initial = ("--initial-checkpoint", str(finished_run / "model.safetensors"))
    for processes in (1, 2):
        run(processes, "tiny_staged", data_folder, tmp_path / str(processes), *initial)
    one, two = read_log(tmp_path / "1"), read_log(tmp_path / "2")
    assert len(one) == 6
    for ours, alone in zip(two, one, strict=True):
        assert ours["train_loss"] == pytest.approx(alone["train_loss"], rel=2e-2), ours["epoch"]


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(data_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C at torchrun stops both processes after the same step, with one state saved, from which two or one go on."""
    process = start(2, "tiny", data_folder, tmp_path)
    try:
        written = read_until(process, "epoch 2/6")
        process.send_signal(signal.SIGINT)
        written += process.communicate(timeout=300)[0]
    finally:
        end_group(process)
    assert process.returncode != 0
    assert (tmp_path / STATE_FILE).exists(), written
    state = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert (state["epoch"], state["step"]) >= (1, 0)
    run(1, "tiny", data_folder, tmp_path)
    assert len(read_log(tmp_path)) == 6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes outlive a killed torchrun")
def test_processes_end_with_a_killed_torchrun_and_the_run_goes_on(data_folder: Path, tmp_path: Path) -> None:
    """None of them is left to write into the folder, and two processes continue from what was saved."""
    process = start(2, "tiny", data_folder, tmp_path)
    try:
        read_until(process, "epoch 2/6")
        process.kill()
        process.communicate(timeout=60)  # the end of the pipe: nobody else holds it
    finally:
        end_group(process)
    run(2, "tiny", data_folder, tmp_path)
    assert len(read_log(tmp_path)) == 6


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group with this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm2d, (4, 6, 5, 5)), (nn.BatchNorm3d, (1, 6, 5, 5, 4))])
def test_a_synced_norm_is_a_batch_norm(kind: type[nn.BatchNorm2d | nn.BatchNorm3d], shape: tuple[int, ...]) -> None:
    """In a group of one, values, gradients and running statistics are those of torch's batch norm, in training and after."""
    torch.manual_seed(0)
    norm = kind(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    synced = nn.Sequential(kind(6))
    synced[0].load_state_dict(norm.state_dict())
    use_synced_norms(synced, torch.device("cpu"))
    assert type(synced[0]) is SyncedBatchNorm
    results = []
    for layer in (norm, synced):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).mul(3).add(2).requires_grad_()
        y = layer(x)
        (y * torch.arange(y.numel()).view_as(y) / y.numel()).sum().backward()
        with torch.no_grad():
            evaluated = layer.eval()(x)
        results.append([y, x.grad, *(value.grad for value in layer.parameters()), *layer.buffers(), evaluated])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("group_of_one")
def test_a_synced_norm_keeps_the_dtype() -> None:
    """A bf16 batch comes out in bf16, while its statistics are float32."""
    norm = SyncedBatchNorm(3)
    assert norm(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("images_last", [False, True])
def test_the_norms_that_a_network_runs_are_synced(device: str, images_last: bool) -> None:
    """All of them, not copies that only its weights' names lead to."""
    model = build_model("resnet18", TINY.config)
    if images_last:
        use_images_last(model)
    use_synced_norms(model, torch.device(device))
    norms = [module for layer in in_order(model.layers) for module in model.modules_of(layer) if hasattr(module, "running_var")]
    kind = nn.SyncBatchNorm if device == "cuda" else SyncedBatchNorm
    assert len(norms) == 9
    assert all(isinstance(norm, kind) for norm in norms)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shares_cover_the_batch(processes: int) -> None:
    """Every image of a batch is one process's, and all have as many."""
    shares = [list(range(16))[Parallel(rank, processes).share(16)] for rank in range(processes)]
    assert [image for share in shares for image in share] == list(range(16))
    assert {len(share) for share in shares} == {16 // processes}


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    """Unequal shares would weigh images differently; the message says what to start instead."""
    with pytest.raises(RunError, match="a batch of 16 cannot be divided among 3 processes"):
        Parallel(0, 3).share(16)


def test_outside_torchrun_this_is_the_only_process() -> None:
    """A process that nobody else knows of waits for nobody."""
    with open_parallel(torch.device("cpu")) as (parallel, device):
        assert (parallel, device) == (Parallel(0, 1), torch.device("cpu"))
        assert parallel.is_first
        assert parallel.any(True)
        assert not parallel.any(False)
        assert parallel.total(torch.ones(2)).tolist() == [1.0, 1.0]
        with parallel.first_alone():
            pass
