"""``python -m service``: read ``.env`` and the settings, serve; ``python -m service predict`` classifies files instead."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the service, or the command; give the exit status."""
    # Before numpy is imported anywhere: its thread pool would only compete with the model's own threads.
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from dotenv import load_dotenv

    load_dotenv(".env")  # for what the environment does not set
    if sys.argv[1:] == ["--version"]:
        from service import __version__

        print(__version__)  # noqa: T201  # what was asked for
        return 0
    if sys.argv[1:2] == ["predict"]:
        from service.predict.command import predict_files

        return predict_files(sys.argv[2:])
    if sys.platform != "linux":
        sys.stderr.write("the service runs on Linux only; on this system use Docker: docker compose up\n")
        return 2
    from service.observability.logs import set_up_logs
    from service.observability.tracing import check_tracing
    from service.processes.supervisor import Supervisor
    from service.settings import SettingsError, load_settings
    from service.web.access import open_keys
    from service.web.client_address import TrustedProxies
    from service.web.rate_limit import open_rate_limiter
    from service.web.tls import check_tls

    try:
        settings = load_settings(sys.argv[1:])
        check_tls(settings)
        TrustedProxies(settings.trusted_proxies)
        keys = open_keys(settings)
        open_rate_limiter(settings)
        check_tracing(settings)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    set_up_logs(settings)
    return Supervisor(settings, keys).run()


if __name__ == "__main__":
    sys.exit(main())
