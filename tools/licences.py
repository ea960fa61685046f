"""List the licence of every package that this one needs, and fail where one is not allowed.

    make licences    # or: python tools/licences.py, in the development environment

What is installed is looked at, beginning with the requirements of chanscale and following those of each package. An
expression is taken whole: all licences that it names must be allowed, also where one could choose.
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import Distribution, PackageNotFoundError
from typing import NoReturn

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "chanscale"

ALLOWED = frozenset({
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "HPND", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Unlicense", "Zlib",
})  # fmt: skip
"""Licences that ask for no more than that their text goes along."""

EXCEPTIONS = {
    "certifi": ("MPL-2.0", "a list of certificates, taken as it is"),
    "tqdm": ("MPL-2.0 AND MIT", "MPL binds its own files alone; taken as it is"),
    "hypothesis": ("MPL-2.0", "runs tests; MPL binds its own files alone"),
    "pathspec": ("MPL-2.0", "a part of mypy; MPL binds its own files alone"),
}
"""The package -> the licence that it may have in spite of ALLOWED, and why."""

PROPRIETARY = re.compile(r"nvidia-.*|cuda-.*")
"""CUDA, which torch from PyPI brings on Linux: NVIDIA's terms let it be used, and nothing here hands it on."""

SPELLINGS = {
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "BSD 3-Clause License": "BSD-3-Clause",
    "BSD License": "BSD-3-Clause",  # the classifier does not tell how many clauses; none of them matters here
    "BSD": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
"""What packages call their licence -> its SPDX expression."""


@dataclass(frozen=True)
class Package:
    """An installed package; `wanted_by` are the parts of chanscale that need it: 'runtime', or an extra."""

    name: str
    version: str
    licence: str | None
    wanted_by: tuple[str, ...]


def main() -> None:
    """Print a line for each package; exit with 1 where a licence is not allowed or told, with 2 without chanscale."""
    try:
        packages = list_packages()
    except PackageNotFoundError as error:
        fail(f"error: {error.name} must be installed to be looked at; run `make .venv/installed-dev`", code=2)
    for package in packages:
        print(
            f"{package.name:26} {package.version:18} {package.licence or '?'} ({', '.join(package.wanted_by)})"
        )
    complaints = [complaint for package in packages if (complaint := find_fault(package))]
    if complaints:
        fail("\n".join(complaints), code=1)
    print(f"{len(packages)} packages, all with a licence that is allowed")


def fail(words: str, *, code: int) -> NoReturn:
    """Say what is wrong, and exit."""
    print(words, file=sys.stderr)
    sys.exit(code)


def list_packages() -> list[Package]:
    """Return what is installed of the requirements of chanscale, sorted. Raises PackageNotFoundError."""
    parts = {"runtime": follow(""), **{extra: follow(extra) for extra in extras()}}
    wanted_by: dict[str, list[str]] = {}
    for part, names in parts.items():
        for name in names:
            wanted_by.setdefault(name, []).append(part)
    return [describe(name, by) for name, by in sorted(wanted_by.items())]


def extras() -> list[str]:
    """Return the extras of chanscale."""
    return metadata.distribution(ROOT).metadata.get_all("Provides-Extra") or []


def follow(extra: str) -> set[str]:
    """Return the installed packages that chanscale needs, with an extra or, for '', without any.

    What is not installed is passed over: it is for another system, or the extra was not asked for.
    """
    names: set[str] = set()
    waiting = [(ROOT, extra)]
    seen = set(waiting)
    while waiting:
        for found in requirements(*waiting.pop()):
            names.add(found[0])
            if found not in seen:
                seen.add(found)
                waiting.append(found)
    return names - {ROOT}


def requirements(name: str, extra: str) -> Iterable[tuple[str, str]]:
    """Yield what an installed package needs on this machine: names, each with no extra and with those asked for."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        found = canonicalize_name(requirement.name)
        if is_installed(found):
            yield from ((found, part) for part in ("", *requirement.extras))


def is_installed(name: str) -> bool:
    """Tell whether a package is installed."""
    try:
        metadata.distribution(name)
    except PackageNotFoundError:
        return False
    return True


def describe(name: str, wanted_by: Iterable[str]) -> Package:
    """Return what an installed package says of itself."""
    found = metadata.distribution(name)
    return Package(name, found.version, licence_of(found), tuple(wanted_by))


def licence_of(found: Distribution) -> str | None:
    """Return the SPDX expression of a package: what it states, else what its classifiers or its one line mean."""
    told: Mapping[str, str] = found.metadata  # type: ignore[assignment]
    classifiers = found.metadata.get_all("Classifier") or []
    named = [line.rpartition(" :: ")[2] for line in classifiers if line.startswith("License :: ")]
    line = next(iter((told.get("License") or "").splitlines()), "").strip()
    candidates = [
        told.get("License-Expression"),
        line,
        " AND ".join(SPELLINGS.get(name, name) for name in named),
    ]
    spelled = (SPELLINGS.get(text, text) for text in candidates if text)
    return next((text for text in spelled if is_expression(text)), None)


def is_expression(text: str) -> bool:
    """Tell whether a text is made of identifiers of licences, and not the name or the wording of one."""
    return all(
        re.fullmatch(r"[A-Za-z0-9.+-]+( WITH [A-Za-z0-9.-]+)?", part) for part in identifiers(text)
    ) and (text.upper() not in {"UNKNOWN", "DUAL", "OTHER", "PROPRIETARY"})


def identifiers(expression: str) -> list[str]:
    """Return the licences that an expression names, each with its WITH."""
    return [part.strip("() ") for part in re.split(r"\s+(?:AND|OR)\s+", expression)]


def find_fault(package: Package) -> str | None:
    """Return what is wrong with the licence of a package, in a line; None if nothing is."""
    if PROPRIETARY.fullmatch(package.name):
        return None
    if package.licence is None:
        return f"error: {package.name} does not tell its licence; look it up, and add it to EXCEPTIONS with a reason"
    excepted, _ = EXCEPTIONS.get(package.name, (None, ""))
    foreign = [part for part in identifiers(package.licence) if part not in ALLOWED]
    if foreign and package.licence != excepted:
        return (
            f"error: {package.name} has the licence {package.licence}, of which {', '.join(foreign)} is not allowed; "
            "do without it, or add it to EXCEPTIONS with a reason"
        )
    return None


if __name__ == "__main__":
    main()
