from pathlib import Path

import psutil
import pytest

from chanscale.data.memory import free_memory

FREE = 10_000


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which 10,000 bytes are free."""
    memory = psutil.virtual_memory()._replace(available=FREE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def write(root: Path, **contents: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (root / name.replace("__", ".")).write_text(content + "\n")


def test_without_limits_it_is_what_the_machine_has(tmp_path: Path) -> None:
    assert free_memory(tmp_path) == FREE
    write(tmp_path / "sys/fs/cgroup", memory__max="max", memory__current="700")
    assert free_memory(tmp_path) == FREE


def test_the_limit_of_a_container_counts_less_what_is_used(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    write(group, memory__max="1000", memory__current="700")
    assert free_memory(tmp_path) == 300
    write(group, memory__stat="anon 100\ninactive_file 450\nactive_file 150")  # pages that are given back
    assert free_memory(tmp_path) == 750
    write(group, memory__max="500")
    assert free_memory(tmp_path) == 250
    write(group, memory__max="100")
    assert free_memory(tmp_path) == 0
    write(group, memory__max="90000")
    assert free_memory(tmp_path) == FREE


def test_the_limit_of_a_job_counts_and_those_above_it(tmp_path: Path) -> None:
    write(tmp_path / "proc/self", cgroup="0::/jobs/7/step")
    write(tmp_path / "sys/fs/cgroup/jobs/7/step", memory__max="max", memory__current="100")
    write(tmp_path / "sys/fs/cgroup/jobs/7", memory__max="800", memory__current="300")
    assert free_memory(tmp_path) == 500
    write(tmp_path / "sys/fs/cgroup/jobs", memory__max="900", memory__current="600")
    assert free_memory(tmp_path) == 300


def test_the_older_version_of_groups_counts(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/memory"
    write(tmp_path / "proc/self", cgroup="5:cpu,cpuacct:/other\n4:memory:/docker/abc\n0::/")
    write(group, memory__limit_in_bytes="1000", memory__usage_in_bytes="900")
    write(group, memory__stat="inactive_file 1\ntotal_inactive_file 50")
    assert free_memory(tmp_path) == 150
    write(group, memory__limit_in_bytes=str(2**63 - 4096))  # what it says for none
    assert free_memory(tmp_path) == FREE
    write(group / "docker/abc", memory__limit_in_bytes="500", memory__usage_in_bytes="100")
    assert free_memory(tmp_path) == 400


def test_this_machine_has_some_memory_left() -> None:
    assert 0 < free_memory() <= FREE
