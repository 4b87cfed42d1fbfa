"""How many cores there are: affinity and cgroup quotas, as Linux writes them into its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.cpu import CoreShares, available_cores, has_int8_dot_products, share_cores

Cores = Callable[[str], int]


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that may run on eight cores, wherever the tests run."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


def write(folder: Path, **files: str) -> None:
    """Write files of a cgroup; two underscores in a name stand for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def cores(tmp_path: Path) -> Cores:
    """What a process counts whose ``/proc/self/cgroup`` holds a text, below ``tmp_path`` as ``/sys/fs/cgroup``."""

    def count(membership: str) -> int:
        (tmp_path / "membership").write_text(membership)
        return available_cores(tmp_path, tmp_path / "membership")

    return count


# Affinity


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    """Where there is nothing to read, as on a bare machine, all cores of the process are its own."""
    assert available_cores(tmp_path / "none", tmp_path / "none") == 8


def test_the_real_affinity_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process pinned to one core has one, however many the machine has."""
    monkeypatch.undo()
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity")
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert available_cores(tmp_path, tmp_path / "none") == 1
    finally:
        os.sched_setaffinity(0, before)


def test_a_system_without_affinity_counts_its_processors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On macOS and Windows there is no affinity; the number of processors counts."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert available_cores(tmp_path, tmp_path / "none") == 3
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores(tmp_path, tmp_path / "none") == 1


# cgroup v2


@pytest.mark.parametrize(
    ("cpu_max", "expected"),
    [
        ("max 100000\n", 8),
        ("400000 100000\n", 4),
        ("150000 100000\n", 1),  # an extra thread would be throttled together with all others
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("50000 10000\n", 5),
        ("", 8),
        ("garbage\n", 8),
        ("max\n", 8),
        ("100000 0\n", 8),
    ],
)
def test_a_v2_quota_is_whole_cores_and_at_least_one(tmp_path: Path, cores: Cores, cpu_max: str, expected: int) -> None:
    """Quota over period, rounded down, never more than the affinity; a file that cannot be read limits nothing."""
    write(tmp_path, cpu__max=cpu_max)
    assert cores("0::/\n") == expected


def test_the_own_v2_cgroup_binds(tmp_path: Path, cores: Cores) -> None:
    """A service that systemd limits finds its quota below the root, where its membership says."""
    write(tmp_path / "system.slice" / "prediction.service", cpu__max="200000 100000\n")
    write(tmp_path / "system.slice" / "other.service", cpu__max="100000 100000\n")
    assert cores("0::/system.slice/prediction.service\n") == 2


def test_the_tightest_quota_above_binds(tmp_path: Path, cores: Cores) -> None:
    """A slice's quota holds for all that is in it, also when the service itself has a larger one or none."""
    write(tmp_path / "a.slice", cpu__max="300000 100000\n")
    write(tmp_path / "a.slice" / "b.service", cpu__max="600000 100000\n")
    assert cores("0::/a.slice/b.service\n") == 3
    write(tmp_path / "a.slice" / "b.service", cpu__max="max 100000\n")
    assert cores("0::/a.slice/b.service\n") == 3


def test_a_container_sees_its_quota_at_the_root(tmp_path: Path) -> None:
    """Its membership may name a path of the host, or one outside its namespace, that it cannot see."""
    root = tmp_path / "namespace"
    write(root, cpu__max="200000 100000\n")
    write(tmp_path / "elsewhere", cpu__max="100000 100000\n")
    for path in ("/docker/0123abc", "/../elsewhere"):
        (tmp_path / "membership").write_text(f"0::{path}\n")
        assert available_cores(root, tmp_path / "membership") == 2


# cgroup v1


@pytest.mark.parametrize(
    ("quota", "period", "expected"),
    [
        ("-1\n", "100000\n", 8),
        ("300000\n", "100000\n", 3),
        ("150000\n", "100000\n", 1),
        ("x\n", "100000\n", 8),
        ("100000\n", "0\n", 8),
    ],
)
def test_a_v1_quota_is_whole_cores(tmp_path: Path, cores: Cores, quota: str, period: str, expected: int) -> None:
    """The older layout: two files, and -1 for no limit."""
    write(tmp_path / "cpu", cpu__cfs_quota_us=quota, cpu__cfs_period_us=period)
    assert cores("4:memory:/\n2:cpu,cpuacct:/\n") == expected


def test_the_own_v1_cgroup_binds(tmp_path: Path, cores: Cores) -> None:
    """It is the path beside the cpu controller, not the one beside another or beside a controller with a like name."""
    write(tmp_path / "cpu" / "docker" / "a", cpu__cfs_quota_us="200000\n", cpu__cfs_period_us="100000\n")
    write(tmp_path / "cpu" / "b", cpu__cfs_quota_us="100000\n", cpu__cfs_period_us="100000\n")
    assert cores("5:cpuset:/b\n4:memory:/b\n2:cpu,cpuacct:/docker/a\n0::/\n") == 2


def test_a_quota_that_is_half_written_limits_nothing(tmp_path: Path, cores: Cores) -> None:
    """A period without a quota is no quota."""
    write(tmp_path / "cpu", cpu__cfs_period_us="100000\n")
    assert cores("2:cpu:/\n") == 8


# Instructions


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni\n", True),
        ("flags\t\t: fpu amx_tile amx_int8\n", True),
        ("Features\t: fp asimd asimddp\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("Features\t: fp asimd\n", False),
        ("flags\t\t: not_avx512_vnni\n", False),
    ],
)
def test_int8_dot_products_are_told_by_the_processor_s_flags(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    """VNNI, AMX and Arm's dot products sum in 32 bits; what came before saturates and costs accuracy."""
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_int8_dot_products(tmp_path / "cpuinfo") is expected


def test_an_unknown_processor_has_no_int8_dot_products(tmp_path: Path) -> None:
    """Where the system does not tell, the careful answer is no."""
    assert not has_int8_dot_products(tmp_path / "none")


# How the cores are shared


@pytest.mark.parametrize(
    ("cores", "shares"),
    [(1, CoreShares(1, 1, 1, 1)), (2, CoreShares(1, 2, 2, 2)), (3, CoreShares(2, 1, 3, 3)), (16, CoreShares(15, 1, 16, 16))],
)
def test_the_cores_alone_decide(cores: int, shares: CoreShares) -> None:
    """Workers, decode threads of each, model threads and streams, where the user chose nothing."""
    assert share_cores(cores) == shares


def test_what_the_user_chose_stays() -> None:
    """Each choice is kept, and the others follow from it."""
    assert share_cores(4, workers=1) == CoreShares(1, 4, 4, 4)
    assert share_cores(4, decode_threads=3, cpu_threads=2) == CoreShares(3, 3, 2, 2)
    assert share_cores(4, streams=1) == CoreShares(3, 1, 4, 1)
