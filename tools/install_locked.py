"""Install exactly what a lock names, each file only if its SHA-256 is there, and this package then, without any more.

.venv/bin/python tools/install_locked.py requirements.lock [PIP ARGUMENTS...]
"""

import importlib
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
CPU_WHEELS = ROOT / "tools" / "torch-cpu.sha256"
CUDA_LOCK = ROOT / "requirements-cuda.lock"


class InstallError(Exception):
    """Something was not installed."""


def main(lock: str, pip_arguments: list[str]) -> None:
    """Install; exit with 2 at the first step that fails, with what to do."""
    try:
        install(ROOT / lock, pip_arguments)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def install(lock: Path, pip_arguments: list[str]) -> None:
    """Install the lock, what torch needs beside it, and the package. Raises InstallError."""
    hashed = ("install", "--require-hashes", "--no-deps", *pip_arguments, "-r")
    install_small_torch(hashed)
    pip(*hashed, str(lock))
    if needs_cuda():
        pip(*hashed, str(CUDA_LOCK))
    # No isolation: setuptools is in the lock, and an isolated build would fetch another, unchecked.
    pip("install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    pip("check")


def install_small_torch(hashed: tuple[str, ...]) -> None:
    """Install the small build of torch, if one of its digests is offered; the lock is then content with it.

    From the lock alone, pip would take it from an index, and not from a folder (--find-links), which tells no digests.
    """
    lines = [line.split() for line in CPU_WHEELS.read_text(encoding="utf-8").splitlines()]
    (version,) = {name.split("-")[1] for _, name in lines}
    text = f"torch=={version}" + "".join(f" --hash=sha256:{digest}" for digest, _ in lines)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "torch.txt"
        path.write_text(text + "\n", encoding="utf-8")
        command = (sys.executable, "-m", "pip", *hashed, str(path))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(
        f"torch {version}" if done.returncode == 0 else f"no torch {version} here; taking that of the lock",
        flush=True,
    )


def needs_cuda() -> bool:
    """Tell whether the torch that was installed is the one of PyPI for Linux: it names CUDA packages."""
    importlib.invalidate_caches()
    requirements = metadata.requires("torch") or []
    wanted = any(line.startswith(("nvidia-", "cuda-", "triton")) for line in requirements)
    return wanted and sys.platform == "linux"


def pip(*arguments: str) -> None:
    """Run pip in this environment. Raises InstallError unless it exits with 0."""
    if subprocess.run((sys.executable, "-m", "pip", *arguments), check=False).returncode != 0:
        raise InstallError(
            f"`pip {shlex.join(arguments)}` failed, as its lines above say. If a mirror has other files than PyPI, "
            "so that hashes differ, LOCK=0 installs by version alone."
        )


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
