"""Look up known vulnerabilities of every locked version: exit with 0 if there is none, with 1 if there are some.

    make audit    # or: python tools/audit.py, where `pip-audit` is installed

It asks PyPI's JSON service, and sends it the names and versions in the lock files. Where that does not answer, nothing
is known: one line, and exit code 3.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("requirements-dev.lock", "requirements-cuda.lock", "tools/requirements.lock")
CLEAN, VULNERABLE, UNKNOWN = 0, 1, 3


def main() -> None:
    """Print what was found, and exit with what that means."""
    code, lines = judge(*audit())
    print("\n".join(lines), file=sys.stdout if code == CLEAN else sys.stderr)
    sys.exit(code)


def audit() -> tuple[str, str]:
    """Return what pip-audit prints of the locks, as JSON, and what it complains of."""
    files = [argument for lock in LOCKS for argument in ("-r", str(ROOT / lock))]
    options = ("-f", "json", "--progress-spinner", "off", "--disable-pip", "--require-hashes")
    done = subprocess.run(
        (sys.executable, "-m", "pip_audit", *options, *files), capture_output=True, text=True, check=False
    )
    return done.stdout, done.stderr


def judge(printed: str, complaints: str) -> tuple[int, list[str]]:
    """Return the exit code and the lines to print, of what pip-audit printed."""
    try:
        packages: list[dict[str, Any]] = json.loads(printed)["dependencies"]
    except (ValueError, LookupError, TypeError):
        reason = (complaints.strip().splitlines() or ["it printed nothing"])[-1]
        return UNKNOWN, [
            f"nothing is known: the audit did not come to an end ({reason[:200]}); try again later"
        ]
    known = [package for package in packages if "vulns" in package]
    # pip-audit passes over what the service does not know, and would call a mirror without the service clean.
    if not known:
        return UNKNOWN, [
            f"nothing is known: PyPI's service told of none of {len(packages)} packages, as where a mirror stands in "
            "for it; try again where https://pypi.org/pypi/pip/json is reached"
        ]
    found = [describe(package, flaw) for package in known for flaw in package["vulns"]]
    if found:
        return VULNERABLE, [*found, f"{len(found)} known vulnerabilities; raise these versions"]
    return CLEAN, [
        f"no known vulnerability in {len(known)} of {len(packages)} packages; of the others nothing is known"
    ]


def describe(package: dict[str, Any], flaw: dict[str, Any]) -> str:
    """Return a line that names a vulnerability, and the versions that mend it."""
    mended = ", ".join(flaw["fix_versions"]) or "no version yet"
    return f"{package['name']} {package['version']}: {flaw['id']}, mended in {mended}"


if __name__ == "__main__":
    main()
