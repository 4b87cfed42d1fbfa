"""``python -m service``: read ``.env`` and the settings, serve; ``python -m service predict`` classifies files instead."""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> int:
    """Run the service, or the command; give the exit status."""
    # In the place of a closed standard descriptor the next file would be opened, and get what is printed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    # Before numpy is imported anywhere: its thread pool would only compete with the model's own threads.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from dotenv import load_dotenv

    try:
        load_dotenv(".env")  # for what the environment does not set
    except (OSError, ValueError) as error:
        return _refuse(f"cannot read .env: {error}")
    if sys.argv[1:] == ["--version"]:
        from service import __version__

        print(__version__)  # noqa: T201  # what was asked for
        return 0
    if sys.argv[1:2] == ["predict"]:
        from service.predict.command import predict_files

        return predict_files(sys.argv[2:])
    if sys.platform != "linux":
        return _refuse("the service runs on Linux only; on this system use Docker: docker compose up")
    # Until the supervisor handles signals: Ctrl-C ends this without a traceback, and there is no model to check.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from service.observability.logs import set_up_logs
    from service.observability.tracing import check_tracing
    from service.processes.supervisor import Supervisor
    from service.settings import SettingsError, load_settings
    from service.web.access import open_keys
    from service.web.client_address import TrustedProxies
    from service.web.rate_limit import open_rate_limiter
    from service.web.tls import open_tls

    try:
        settings = load_settings(sys.argv[1:])
        open_tls(settings)
        TrustedProxies(settings.trusted_proxies)
        keys = open_keys(settings)
        open_rate_limiter(settings)
        check_tracing(settings)
    except SettingsError as error:
        return _refuse(str(error))
    set_up_logs(settings)
    return Supervisor(settings, keys).run()


def _refuse(why: str) -> int:
    """Say why there is no service, where that can be said; return the exit status."""
    with contextlib.suppress(OSError):
        os.write(2, f"{why}\n".encode(errors="backslashreplace"))
    return 2


if __name__ == "__main__":
    sys.exit(main())
