"""What a run writes down, and which device it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.run.device import find_device
from training.run.run_folder import RunFolder, read_log


def test_a_row_of_the_log_is_written_by_its_names(tmp_path: Path) -> None:
    """Whatever the order of a row's figures, each is under its own title."""
    folder = RunFolder(tmp_path)
    rows = [{"epoch": 1.0, "val_loss": 0.5, "elapsed_s": 3.0}, {"elapsed_s": 6.0, "epoch": 2.0, "val_loss": 0.25}]
    folder.write_epoch(rows)
    folder.close()
    assert read_log(tmp_path) == rows


def test_the_second_gpu_is_that_one_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only asks for "cuda" gets the device that was named; one that is not there is refused."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(torch.device(device).index))
    assert find_device("cuda") == torch.device("cuda")
    assert find_device("cuda:1") == torch.device("cuda:1")
    assert current == [0, 1]
    with pytest.raises(ValueError, match="there is no device 'cuda:2'; torch finds 2 CUDA devices"):
        find_device("cuda:2")
