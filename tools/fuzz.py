"""Feed changed files to each reader: nothing but a ChanscaleError may come out, soon, and nothing may be written.

    make fuzz                                              # all targets, 20 seconds each
    python tools/fuzz.py TARGET --runs 10000 --seconds 60  # one of `fuzz_targets.TARGETS`

It needs atheris, which is no dependency: `make fuzz` installs it apart. What breaks a reader is left in a file
that the last lines name; `python tools/fuzz.py TARGET FILE` reads it again. Images are held to a million pixels or
voxels, so that none is slow for its size alone.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "build" / "fuzz"
SECONDS_OF_ONE, MIB, PIXELS = 30, 4096, 1 << 20
FOLLOWED = ("chanscale", "fuzz_targets", "yaml", "tifffile", "pydicom", "nibabel")
"""Packages whose branches the fuzzer sees, and tries to reach all of."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
FOREIGN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
    "os.chmod",
)


def main() -> None:
    """Run one target, or all, and exit with 1 if one was broken."""
    parser = argparse.ArgumentParser(description="Feed changed files to a reader.")
    parser.add_argument("target", help="a reader, or all")
    parser.add_argument("file", nargs="?", type=Path, help="read this input alone")
    parser.add_argument("--runs", type=int, default=-1, help="inputs at most, of each target")
    parser.add_argument("--seconds", type=int, default=20, help="seconds at most, for each target")
    parser.add_argument("--seed", type=int, default=0, help="of the changes; 0: another each time")
    options = parser.parse_args()
    targets = load_targets()
    if options.target not in (*targets, "all"):
        sys.exit(f"error: wanted one of {', '.join(targets)}, or all. Got {options.target!r}.")
    names = list(targets) if options.target == "all" else [options.target]
    FOUND.mkdir(parents=True, exist_ok=True)
    held = [run(name, options) for name in names]
    sys.exit(0 if all(held) else 1)


def load_targets() -> dict[str, Any]:
    """Import all that is to be watched."""
    import atheris

    sys.path.insert(0, str(ROOT / "tests"))
    sys.dont_write_bytecode = True  # the one thing that reading may write, when it imports
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stderr(nowhere),
        atheris.instrument_imports(include=FOLLOWED),
    ):
        from fuzz_targets import TARGETS
    return TARGETS


def run(name: str, options: argparse.Namespace) -> bool:
    """Feed one target in a process of its own, print a line of it, and return whether it held."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        log = Path(folder, "log")
        if not (child := os.fork()):
            handle = os.open(log, os.O_WRONLY | os.O_CREAT)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            leave(lambda: fuzz(name, Path(folder), options))
        _, status = os.waitpid(child, 0)
        told = log.read_text(encoding="utf-8", errors="replace")
    counts = re.findall(r"^(?:Done |#)(\d+)", told, re.MULTILINE) or ["0"]
    print(f"{name:10} {counts[-1]:>9} inputs, {'BROKEN' if status else 'held'}", flush=True)
    if status:
        print("\n".join(told.splitlines()[-40:]), file=sys.stderr, flush=True)
    return not status


def leave(work: Callable[[], None]) -> None:
    """Do the work of a child, and end it, so that it clears nothing that is its parent's."""
    try:
        work()
    except SystemExit as error:
        os._exit(error.code if isinstance(error.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def fuzz(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Feed one target; does not return."""
    import atheris
    from fuzz_targets import TARGETS, words

    target, corpus, work = TARGETS[name], folder / "corpus", folder / "work"
    corpus.mkdir()
    work.mkdir()
    for index, seed in enumerate(target.seeds()):
        (corpus / str(index)).write_bytes(seed)
    (folder / "words").write_text("".join(f'"{word}"\n' for word in words()), encoding="utf-8")
    limits = [f"-timeout={SECONDS_OF_ONE}", f"-rss_limit_mb={MIB}", f"-max_total_time={options.seconds}"]
    told = [
        f"-runs={options.runs}",
        f"-seed={options.seed}",
        f"-dict={folder / 'words'}",
        f"-artifact_prefix={FOUND / name}-",
        "-max_len=65536",
    ]
    quiet()
    atheris.Setup(["fuzz", str(options.file or corpus), *limits, *told], feeder(target, work))
    atheris.Fuzz()


def quiet() -> None:
    """Let decoders warn of what they pass over, unheard, and hold images to a size."""
    from PIL import Image

    from chanscale.data import volumes

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    Image.MAX_IMAGE_PIXELS = volumes.MAX_VOXELS = PIXELS


def feeder(target: Any, work: Path) -> Any:
    """Return the function that writes an input to a file, reads it, and raises what must not be."""
    from chanscale.errors import ChanscaleError

    path, faults = work / target.name, watch(work.parent)

    def feed(data: bytes) -> None:
        path.write_bytes(target.pack(data))
        faults.clear()
        try:
            target.read(path)
        except ChanscaleError as error:
            line = str(error)
            if not line or "\n" in line or len(line) > 5000:
                raise AssertionError(
                    f"an error of {len(line)} characters is no line: {line[:200]!r}"
                ) from error
        if faults:
            raise AssertionError(f"reading must touch nothing: {faults}")

    return feed


def watch(allowed: Path) -> list[str]:
    """Return a list to which all that is written outside a folder, run or called is added, from now on."""
    faults: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        outside = not str(arguments[0] if arguments else "").startswith((str(allowed), "/dev/null"))
        if event in FOREIGN or ((writes or event in CHANGES) and outside):
            faults.append(f"{event} {arguments[:1]}")

    sys.addaudithook(note)
    return faults


if __name__ == "__main__":
    main()
