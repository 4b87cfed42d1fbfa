"""What is left of a server under test when the benchmark that started it is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support.patience import wait_until

_BENCHMARK = """
import sys, time
from benchmarks.servers.server_process import ServerProcess, exit_on_signals

exit_on_signals()
server = "import os, time; print('ready on http://127.0.0.1:1', os.getpid(), flush=True); time.sleep(600)"
with ServerProcess([sys.executable, "-c", server], environment={}) as process:
    print(process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_ends_a_benchmark_ends_its_server(number: signal.Signals) -> None:
    """The server goes before the benchmark does, and the exit status names the signal."""
    with subprocess.Popen([sys.executable, "-c", _BENCHMARK], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as benchmark:
        assert benchmark.stdout is not None
        server = int(benchmark.stdout.readline())
        os.kill(server, 0)
        benchmark.send_signal(number)
        status = benchmark.wait(60)
    assert status in (128 + number, -number)
    wait_until(lambda: not _exists(server))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
