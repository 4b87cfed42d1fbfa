"""The running service against its own OpenAPI document: schemathesis makes requests from it, sound and unsound ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from benchmarks.servers.service_process import ServiceProcess

EXAMPLES_PER_OPERATION = 50
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)


@pytest.mark.slow
def test_answers_are_as_documented(service: ServiceProcess, tmp_path: Path) -> None:
    """No answer is a 500, and each has a status, a type, headers and a body that the document has for its operation."""
    model = httpx.get(f"{service.url}/labels").json()["model"]
    configuration = f"""
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 504]  # 504 for the requests that ask for a deadline of a millisecond

[parameters]
"path.model_name" = "{model["name"]}"
"path.model_version" = "{model["version"]}"
"""
    (tmp_path / "schemathesis.toml").write_text(configuration)
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", "--no-color"]
    options = {
        "--checks": ",".join(CHECKS),
        "--phases": "examples,coverage,fuzzing",
        "--max-examples": str(EXAMPLES_PER_OPERATION),
        "--seed": "1",
        "--workers": "1",
        "--request-timeout": "60",
    }
    arguments = [part for option in options.items() for part in option]
    done = subprocess.run(
        [*command, *arguments, "--continue-on-failure", f"{service.url}/openapi.json"],
        cwd=tmp_path,  # where it looks for its configuration, and keeps its examples
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(service.engine_pids) == 1
    assert "Traceback" not in service.output
