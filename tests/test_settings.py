"""Settings from environment and flags: read alike, validated in words that name them, and fixed once made."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Le
from pydantic import SecretStr, ValidationError

from service import __version__
from service.settings import DEFAULT_CHECKPOINT, Settings, SettingsError, choices, load_settings

FIELDS = Settings.model_fields
NUMBERS = sorted(name for name, field in FIELDS.items() if field.annotation in (int, float))
CHOICES = sorted(name for name in FIELDS if choices(name))
SWITCHES = sorted(name for name, field in FIELDS.items() if field.annotation is bool)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the settings of whoever runs the tests out of them."""
    for name in os.environ:
        if name.upper().startswith("SERVICE_"):
            monkeypatch.delenv(name)


def another_value(name: str) -> Any:
    """A valid value that is not the setting's default."""
    others = {
        "cors_origins": "https://elsewhere",
        "device": "cpu",
        "memory_budget_bytes": 2**30,
        "otlp_endpoint": "http://elsewhere",
        "root_path": "/elsewhere",
        "unknown_threshold": 0.5,
    }
    if name in others:
        return others[name]
    field = FIELDS[name]
    if name in NUMBERS:
        return field.default + 1 if field.default + 1 <= upper_limit(name) else field.default / 2
    if field.annotation is bool:
        return not field.default
    if name in CHOICES:
        return next(choice for choice in choices(name) if choice != field.default)
    if field.annotation is SecretStr:
        return SecretStr("elsewhere")
    if field.annotation is str:
        return "elsewhere"
    return Path("/elsewhere")


def upper_limit(name: str) -> float:
    """The most that a number may be."""
    return next((float(rule.le) for rule in FIELDS[name].metadata if isinstance(rule, Le)), math.inf)  # type: ignore[arg-type]


def as_text(value: Any) -> str:
    return str(value.get_secret_value() if isinstance(value, SecretStr) else value)


# Reading


def test_without_environment_and_flags_all_are_defaults() -> None:
    """The service starts with no setting at all, and every default is a valid value."""
    settings = load_settings()
    assert settings.model_dump() == {name: field.default for name, field in FIELDS.items()}
    assert Settings.model_validate(settings.model_dump()) == settings


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_read_from_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``SERVICE_<NAME>`` sets this setting and no other."""
    value = another_value(name)
    expected = load_settings().model_copy(update={name: value})
    monkeypatch.setenv(f"SERVICE_{name.upper()}", as_text(value))
    assert load_settings() == expected


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_is_a_flag(name: str) -> None:
    """``--<name> value`` sets this setting and no other; a switch needs no value."""
    value = another_value(name)
    arguments = [f"--{name}"] if name in SWITCHES else [f"--{name}", as_text(value)]
    assert load_settings(arguments) == load_settings().model_copy(update={name: value})


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever types a flag means this start; the environment is for all of them."""
    monkeypatch.setenv("SERVICE_PORT", "1111")
    monkeypatch.setenv("SERVICE_HOST", "0.0.0.0")
    monkeypatch.setenv("SERVICE_ACCESS_LOG", "true")
    settings = load_settings(["--port=2222", "--no-access_log"])
    assert (settings.port, settings.host, settings.access_log) == (2222, "0.0.0.0", False)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files and charts pass variables on that nobody has set."""
    monkeypatch.setenv("SERVICE_PORT", "")
    monkeypatch.setenv("SERVICE_TLS_CERTIFICATE", "")
    assert load_settings() == Settings.model_construct(**{name: field.default for name, field in FIELDS.items()})


def test_words_are_read_without_regard_to_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """``INFO`` is what other programs call it."""
    monkeypatch.setenv("SERVICE_LOG_LEVEL", "WARNING")
    settings = load_settings(["--device=CUDA:1", "--precision", "INT8"])
    assert (settings.log_level, settings.device, settings.precision) == ("warning", "cuda:1", "int8")


def test_flags_may_be_written_with_hyphens() -> None:
    """Their values are left as they are."""
    settings = load_settings(["--max-batch-size=8", "--shutdown-grace-s", "1", "--no-access-log", "--api-keys=--a-b"])
    assert (settings.max_batch_size, settings.shutdown_grace_s, settings.access_log) == (8, 1.0, False)
    assert settings.api_keys.get_secret_value() == "--a-b"


def test_the_command_line_of_the_process_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only arguments that are handed over count, so that code that embeds the service keeps its own."""
    monkeypatch.setattr(sys, "argv", ["program", "--port", "2222"])
    assert load_settings().port == load_settings([]).port == 8000


def test_the_default_checkpoint_lies_in_the_package() -> None:
    """It is found from any working folder."""
    assert DEFAULT_CHECKPOINT.is_absolute()
    assert DEFAULT_CHECKPOINT.parent.parent == Path(sys.modules["service.settings"].__file__ or "").parent


# Refusing


@pytest.mark.parametrize("name", [*NUMBERS, *CHOICES, *SWITCHES])
def test_nonsense_is_refused_by_the_setting_s_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message holds the name as a flag and as a variable, and what was given."""
    monkeypatch.setenv(f"SERVICE_{name.upper()}", "nonsense")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert f"{name} (SERVICE_{name.upper()}): Input should be" in str(caught.value)
    assert "got 'nonsense'" in str(caught.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_a_lower_limit(name: str) -> None:
    """No negative size, count or time passes."""
    with pytest.raises(SettingsError, match=f"{name} .*: Input should be greater than"):
        load_settings([f"--{name}=-1"])


@pytest.mark.parametrize("name", sorted(name for name in NUMBERS if FIELDS[name].annotation is float))
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_times_are_finite(name: str, value: str) -> None:
    """A time that never comes is no time to wait for."""
    with pytest.raises(SettingsError, match=f"{name} .*: Input should be"):
        load_settings([f"--{name}={value}"])


@pytest.mark.parametrize(
    ("argument", "limit"),
    [
        ("--port=65536", "less than or equal to 65535"),
        ("--max_batch_size=0", "greater than or equal to 1"),
        ("--max_batch_size=4097", "less than or equal to 4096"),
        ("--request_timeout_s=0", "greater than 0"),
        ("--queue_delay_ms=1001", "less than or equal to 1000"),
        ("--device=gpu", r"match pattern '\^\(auto\|cpu\|cuda"),
        ("--device=cuda:x", "match pattern"),
        ("--device=cpu2", "match pattern"),
        ("--precision=int4", "'auto', 'int8', 'bf16' or 'fp32'"),
        ("--port=80.5", "valid integer"),
    ],
)
def test_limits_are_told(argument: str, limit: str) -> None:
    """The message says which values would pass."""
    with pytest.raises(SettingsError, match=limit):
        load_settings([argument])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max_queue_images=100"], "max_queue_images must be at least max_images_per_request and max_batch_size, here 256"),
        (["--cors_origins=https://a.example, b.example"], "'b.example' is no origin; write it like https://example.org"),
        (["--api_keys= , "], "api_keys is set and holds no key"),
        (["--admin_key= "], "admin_key is set and holds no key"),
        (["--root_path=classify"], "root_path: 'classify' is no path; write it like /classify"),
        (["--otlp_endpoint=collector:4318"], "is no address; write it like http://localhost:4318"),
        (["--memory_budget_bytes=1000"], "memory_budget_bytes must be 0 or at least max_body_bytes, here 16777216"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(arguments: list[str], sentence: str) -> None:
    """One sentence says what to change."""
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments)
    [_, line] = str(caught.value).splitlines()
    assert sentence in line


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12"])
def test_every_kind_of_device_passes(device: str) -> None:
    """A device is auto, cpu, or cuda with or without a number."""
    assert load_settings([f"--device={device}"]).device == device


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to start the service five times to find five mistakes."""
    monkeypatch.setenv("SERVICE_WORKERS", "many")
    with pytest.raises(SettingsError) as caught:
        load_settings(["--port=-1", "--runtime=tensorflow"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "cannot start with these settings:"
    assert [line.split()[0] for line in lines[1:]] == ["port", "workers", "runtime"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prot=80"], "unrecognized arguments: --prot=80; did you mean --port?"),
        (["--keep-foldr", "x"], "did you mean --keep-folder?"),
        (["prdict"], "did you mean predict?"),
        (["serve"], "unrecognized arguments: serve; see python -m service --help"),
        (["--port"], "argument --port: expected one argument"),
    ],
)
def test_an_unknown_argument_is_refused_in_one_line(arguments: list[str], told: str) -> None:
    """A mistyped flag or command does nothing unnoticed, and what was meant is named."""
    with pytest.raises(SettingsError) as caught:
        load_settings(arguments)
    assert told in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", FIELDS)
def test_a_misspelt_variable_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter too few, two that have changed places, or a plural names the setting that was meant."""
    for misspelt in {name[:-1], name[0] + name[2] + name[1] + name[3:], f"{name}s"} - FIELDS.keys() - {"api_key"}:
        with monkeypatch.context() as patch:
            patch.setenv(f"SERVICE_{misspelt.upper()}", "1")
            with pytest.raises(SettingsError, match=rf"SERVICE_{misspelt.upper()}: there is no such.* mean SERVICE_\w+\?"):
                load_settings()


def test_a_misspelt_variable_is_told_with_what_else_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the case in which it was written; the setting that was meant comes with it."""
    monkeypatch.setenv("Service_Max_BatchSize", "8")
    with pytest.raises(SettingsError) as caught:
        load_settings(["--port=-1"])
    lines = str(caught.value).splitlines()
    assert lines[1] == "  Service_Max_BatchSize: there is no such setting; did you mean SERVICE_MAX_BATCH_SIZE?"
    assert lines[2].startswith("  port ")


def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that Kubernetes sets in every pod for Services called service and service-a, a name, and the client's key."""
    for service in ("SERVICE", "SERVICE_A"):
        for end in (
            "SERVICE_HOST",
            "SERVICE_PORT",
            "SERVICE_PORT_HTTP",
            "PORT_80_TCP",
            "PORT_80_TCP_PROTO",
            "PORT_80_TCP_ADDR",
        ):
            monkeypatch.setenv(f"{service}_{end}", "tcp://10.0.0.1:80")
    monkeypatch.setenv("SERVICE_A_PORT", "tcp://10.0.0.1:80")
    monkeypatch.setenv("SERVICE_NAME", "cats")
    monkeypatch.setenv("SERVICE_API_KEY", "hunter2")
    assert load_settings() == Settings.model_construct(**{name: field.default for name, field in FIELDS.items()})


def test_a_refused_start_ends_with_status_2_and_no_traceback() -> None:
    """``python -m service`` with a wrong setting tells it on standard error, and nothing else."""
    command = [sys.executable, "-m", "service", "--port=nonsense"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("cannot start with these settings:\n  port (SERVICE_PORT): Input should be a valid integer")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def run_service(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``python -m service`` with ``folder`` as its working folder."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )


def test_the_version_is_printed(tmp_path: Path) -> None:
    """``--version`` says which one is installed, and starts nothing."""
    ended = run_service(["--version"], tmp_path)
    assert (ended.returncode, ended.stdout) == (0, f"{__version__}\n")


def test_another_system_is_told_what_to_do(tmp_path: Path) -> None:
    """One sentence, not a traceback, where the service cannot run."""
    code = "import sys; sys.platform = 'darwin'; from service.__main__ import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "docker compose up" in ended.stderr


def test_a_file_of_variables_is_read(tmp_path: Path) -> None:
    """``.env`` in the working folder counts like the environment; variables of others in it are left alone."""
    (tmp_path / ".env").write_text("GRAFANA_PASSWORD=x\nSERVICE_PORT=nonsense\n")
    ended = run_service([], tmp_path)
    assert ended.returncode == 2
    assert "port (SERVICE_PORT)" in ended.stderr
    (tmp_path / ".env").write_bytes(b"SERVICE_HOST=\xff\n")
    ended = run_service([], tmp_path)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "cannot read .env" in ended.stderr


# Frozen, described, named


def test_settings_cannot_be_changed() -> None:
    """What the service started with is what it runs with."""
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1


def test_unknown_names_are_refused() -> None:
    """Code that makes settings cannot misspell one."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Settings.model_validate({"prot": 80})


def test_help_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """``--help`` shows each flag with its description; line breaks aside."""
    with pytest.raises(SystemExit) as caught:
        load_settings(["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())
    for name, field in FIELDS.items():
        assert field.description, f"{name} has no description"
        assert f"--{name}" in shown
        assert "".join(field.description.split()) in shown


def test_times_carry_their_unit() -> None:
    """Every setting that is a float and no share (at most 1) is a time, in seconds or milliseconds by its name."""
    for name, field in FIELDS.items():
        if field.annotation is float and upper_limit(name) != 1:
            assert name.endswith(("_s", "_ms")), name


def test_keys_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings may be logged: API keys are not part of their text."""
    monkeypatch.setenv("SERVICE_API_KEYS", "hunter2")
    settings = load_settings()
    assert settings.api_keys.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()
