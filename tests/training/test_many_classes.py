"""A thousand classes are trained on, evaluated, reported and served within 4 GiB."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.servers.footprint import group_resident_mb
from benchmarks.servers.service_process import ServiceProcess

CLASSES = 1000
PATIENCE_S = 400.0  # of one command: no expectation of speed
LIMIT_MB = 4096 * 1.048576


def peak_mb(*arguments: str) -> float:
    """Run a command of the training program; return the most memory that it held, in megabytes."""
    process = subprocess.Popen([sys.executable, "-m", "training", *arguments], stdout=subprocess.DEVNULL)
    limit = threading.Timer(PATIENCE_S, process.kill)
    limit.start()
    _, status, usage = os.wait4(process.pid, 0)
    limit.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss / (1000 if sys.platform == "linux" else 1e6)


@pytest.mark.slow
def test_a_thousand_classes_take_four_gibibytes(tmp_path: Path) -> None:
    """In every command, and in all processes of the service together; the report has every file."""
    rng = np.random.default_rng(0)
    data, run = tmp_path / "data", tmp_path / "run"
    for label in range(CLASSES):
        for part, images in (("train", 2), ("test", 1)):
            folder = data / part / f"class {label:04d}"
            folder.mkdir(parents=True)
            for index in range(images):
                Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    shared = ("--data", str(data), "--device", "cpu")
    assert peak_mb("train", *shared, "--recipe", "quick", "--epochs", "1", "--size", "16", "--out", str(run)) < LIMIT_MB
    assert {"confusion.csv", "confusion.png", "mistakes.csv", "mistakes.png"} <= {path.name for path in run.iterdir()}
    checkpoint = run / "model.safetensors"
    assert peak_mb("evaluate", str(checkpoint), *shared) < LIMIT_MB
    with ServiceProcess(checkpoint) as service:
        file = BytesIO()
        Image.new("RGB", (24, 24)).save(file, "PNG")
        answer = httpx.post(f"{service.url}/predict", files={"file": file.getvalue()}, timeout=60).json()
        assert answer["label"].startswith("class ")
        assert group_resident_mb(os.getpgid(service.engine_pids[-1])) < LIMIT_MB
