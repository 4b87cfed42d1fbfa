"""What the system does to a running service: its output, its temporary folder, its signals, its port, a hung worker."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess
from tests.support.patience import wait_until

_PATIENCE_S = 120.0


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def answers(url: str, image: bytes) -> bool:
    """Whether a prediction is answered at ``url`` now."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.post(f"{url}/predict", files={"file": image}, timeout=_PATIENCE_S).status_code == 200
    return False


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["gone", "asleep"])
@pytest.mark.parametrize("output", ["pipe", "terminal"])
def test_output_that_nobody_reads_neither_ends_nor_stalls_it(
    output: str, reader: str, checkpoint_path: Path, image_paths: list[Path], free_port: int
) -> None:
    """With its pipe closed, or full, the service answers, and stops in order; also with its own terminal closed, or stopped."""
    image, url = image_paths[0].read_bytes(), f"http://127.0.0.1:{free_port}"
    flags = [f"--port={free_port}", f"--checkpoint={checkpoint_path}", "--workers=1", "--access-log", "--shutdown-grace-s=0"]
    command, folder = [sys.executable, "-m", "service", *flags], Path(__file__).parents[2]
    if output == "pipe":
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
        process = subprocess.Popen(command, stdout=write, stderr=write, cwd=folder)
    else:  # which sends SIGHUP to all of the service's processes when it is closed
        read, write = pty.openpty()
        process = subprocess.Popen(command, cwd=folder, preexec_fn=partial(os.login_tty, write))
    os.close(write)
    try:
        wait_until(lambda: answers(url, image))
        if reader == "gone":
            os.close(read)
        assert all(answers(url, image) for _ in range(50))  # more lines than the pipe holds
        process.send_signal(signal.SIGTERM)
        assert process.wait(_PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        if reader == "asleep":
            os.close(read)


@pytest.mark.slow
def test_no_file_of_its_own_takes_the_place_of_a_closed_descriptor(
    checkpoint_path: Path, image_paths: list[Path], free_port: int
) -> None:
    """Started with standard input, output and error closed, it answers, prints into nothing, and stops in order."""
    serve = f"exec {sys.executable} -m service --port={free_port} --checkpoint={checkpoint_path} --workers=1 <&- >&- 2>&-"
    with subprocess.Popen(["sh", "-c", serve], cwd=Path(__file__).parents[2]) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{free_port}", image_paths[0].read_bytes()))
            assert {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)} == {os.devnull}
            process.send_signal(signal.SIGTERM)
            assert process.wait(_PATIENCE_S) == 0
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["ro", "size=4k"])
def test_shared_memory_needs_no_room_in_its_folder(
    options: str, checkpoint_path: Path, image_paths: list[Path], free_port: int
) -> None:
    """With a /dev/shm that is read-only, or holds a page, the service answers, and counts in all its processes."""
    serve = f"exec {sys.executable} -m service --port={free_port} --checkpoint={checkpoint_path} --workers=2"
    script = f"mount -t tmpfs -o {options} tmpfs /dev/shm && {serve}"
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*isolated, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], capture_output=True).returncode:
        pytest.skip("no mount of one's own is allowed here")
    url = f"http://127.0.0.1:{free_port}"
    with subprocess.Popen([*isolated, "sh", "-c", script], cwd=Path(__file__).parents[2], start_new_session=True) as process:
        try:
            wait_until(lambda: answers(url, image_paths[0].read_bytes()))
            assert "service_batch_images_count 1.0" in httpx.get(f"{url}/metrics", timeout=_PATIENCE_S).text
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_nothing_of_it_lies_in_the_temporary_folder(tmp_path: Path, checkpoint_path: Path, image_paths: list[Path]) -> None:
    """A cleaner finds nothing to remove, a killed service leaves nothing behind, and the folder's path may be long."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    with ServiceProcess(checkpoint_path, workers=1, environment={"TMPDIR": str(folder)}) as service:
        assert list(folder.iterdir()) == []
        os.kill(service.engine_pids[-1], signal.SIGKILL)
        service.wait_until_ready(times=2)
        assert answers(service.url, image_paths[0].read_bytes())
        assert list(folder.iterdir()) == []


def test_the_port_of_a_killed_service_is_free_for_the_next(checkpoint_path: Path) -> None:
    """Its children end at once, and the next one waits for that."""
    with ServiceProcess(checkpoint_path, workers=2) as killed:
        port = int(killed.url.rpartition(":")[2])
        os.kill(killed.pid, signal.SIGKILL)
        with ServiceProcess(checkpoint_path, workers=1, port=port) as service:
            assert httpx.get(f"{service.url}/health").status_code == 200


def test_a_signal_about_the_model_while_the_engine_is_dead_reaches_the_next(checkpoint_path: Path) -> None:
    """SIGHUP and SIGUSR1 right after the engine's death neither end the service nor hit anybody else, and are not lost."""
    with ServiceProcess(checkpoint_path, workers=1) as service:
        os.kill(service.engine_pids[-1], signal.SIGKILL)
        service.send_signal(signal.SIGHUP)
        service.wait_for_output("engine died")
        service.send_signal(signal.SIGUSR1)
        service.wait_for_output("model refused: there is no model to roll back to")
        assert service.stop() == 0


def test_a_hung_worker_is_replaced(checkpoint_path: Path, image_paths: list[Path]) -> None:
    """A worker whose event loop stands still is killed, and another one answers."""
    with ServiceProcess(checkpoint_path, workers=1, device_timeout_s=2, log_format="text") as service:
        os.kill(service.worker_pids(0)[-1], signal.SIGSTOP)
        service.wait_for_output("worker-0 hangs")
        service.wait_until_ready(times=2)
        assert answers(service.url, image_paths[0].read_bytes())
        assert len(service.engine_pids) == 1


def test_a_worker_that_starts_while_the_key_file_is_gone_has_the_last_keys(
    tmp_path: Path, checkpoint_path: Path, image_paths: list[Path]
) -> None:
    """It admits whom the others admit, is ready when it accepts, and reads the file again once it is there."""
    file, image = tmp_path / "keys", image_paths[0].read_bytes()
    file.write_text("first")

    def status(service: ServiceProcess, key: str) -> int:
        headers = {"x-api-key": key, "content-type": "image/png"}
        return httpx.post(f"{service.url}/predict", content=image, headers=headers, timeout=_PATIENCE_S).status_code

    with ServiceProcess(checkpoint_path, workers=1, api_keys_file=file, log_format="text") as service:
        file.write_text("second")
        service.wait_for_output("api keys read")  # by the supervisor: no request has come
        wait_until(lambda: status(service, "second") == 200)
        file.unlink()
        os.kill(service.worker_pids(0)[-1], signal.SIGKILL)
        service.wait_for_output("worker-0 started", 2)
        assert status(service, "second") == 200
        assert status(service, "first") == 401
        file.write_text("third")
        wait_until(lambda: status(service, "third") == 200)


def test_ps_tells_the_processes_apart(checkpoint_path: Path) -> None:
    """Each process has the name of its place, also in the arguments that ``ps -f`` shows."""
    with ServiceProcess(checkpoint_path, workers=1) as service:
        pids = {"supervisor": service.pid, "engine": service.engine_pids[-1], "worker-0": service.worker_pids(0)[-1]}
        assert {name: Path(f"/proc/{pid}/comm").read_text().strip() for name, pid in pids.items()} == {n: n for n in pids}
        for name in ("engine", "worker-0"):
            assert Path(f"/proc/{pids[name]}/cmdline").read_text().rstrip("\0") == f"service {name}"
