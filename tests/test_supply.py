"""What is installed is locked, what may be installed is stated, and what SECURITY.md says of the source is so."""

import ast
import importlib.util
import json
import re
import sys
from email.message import Message
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from chanscale import config

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "chanscale").rglob("*.py"))
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-cuda.lock", "tools/requirements.lock")


def load(name):
    """Return a module of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


audit, licences, lock = load("audit"), load("licences"), load("lock")

# --- locks


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


def entries(name):
    return lock.split_entries((ROOT / name).read_text(encoding="utf-8"))


def pinned(name):
    return {" ".join(entry.split()[:1]) for entry in entries(name).values()}


def test_every_version_of_the_constraints_is_locked_and_no_other():
    advice = "run `make lock`, which writes the lock files anew"
    # colorama is for Windows, where constraints.txt was not made.
    assert pinned("requirements-dev.lock") - pins() == {"colorama==0.4.6"}, advice
    assert pins() <= pinned("requirements-dev.lock"), advice
    assert pinned("requirements.lock") <= pinned("requirements-dev.lock"), advice


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_an_exact_version_and_a_hash(name):
    found = entries(name)
    assert len(found) > 10
    for entry in found.values():
        first, *rest = (line.removesuffix("\\").strip() for line in entry.splitlines())
        assert [part.operator for part in Requirement(first).specifier] == ["=="]
        assert rest
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in rest)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_nothing_but_its_packages(name):
    """An option in it, such as another index, would be taken by pip."""
    text = (ROOT / name).read_text(encoding="utf-8")
    left = text
    for entry in entries(name).values():
        left = left.replace(entry, "")
    assert all(line.startswith("#") for line in left.splitlines())


def test_torch_is_locked_in_both_builds_and_cuda_apart():
    cpu = {line.split()[0] for line in lock.CPU_WHEELS.read_text(encoding="utf-8").splitlines()}
    for name in ("requirements.lock", "requirements-dev.lock"):
        digests = set(re.findall(r"sha256:([0-9a-f]{64})", entries(name)["torch"]))
        assert cpu < digests
        assert not [package for package in entries(name) if lock.CUDA.fullmatch(package)]
    assert all(lock.CUDA.fullmatch(package) for package in entries("requirements-cuda.lock"))


def test_a_torch_without_its_small_build_is_not_locked():
    with pytest.raises(lock.LockError, match=r"must have the wheels of torch 9\.9\.9\+cpu"):
        lock.with_cpu_wheels({"torch": "torch==9.9.9 \\\n    --hash=sha256:00\n"})


# --- licences


class Installed:
    """What importlib.metadata tells of a package."""

    def __init__(self, **fields):
        self.metadata = Message()
        for name, values in fields.items():
            for value in [values] if isinstance(values, str) else values:
                self.metadata[name.replace("_", "-")] = value


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License_Expression": "Apache-2.0 AND MIT"}, "Apache-2.0 AND MIT"),
        ({"License_Expression": "MIT", "License": "GPL"}, "MIT"),
        ({"License": "3-Clause BSD License"}, "BSD-3-Clause"),
        ({"License": "Apache 2.0", "Classifier": "License :: OSI Approved :: MIT License"}, "Apache-2.0"),
        (
            {"License": "Copyright 1999, all", "Classifier": ["License :: OSI Approved :: BSD License"]},
            "BSD-3-Clause",
        ),
        ({"Classifier": ["Topic :: Scientific", "License :: OSI Approved :: ISC License (ISCL)"]}, "ISC"),
        ({"Classifier": ["License :: OSI Approved"], "License": "a long text"}, None),
        ({"License": "UNKNOWN"}, None),
        ({}, None),
    ],
)
def test_a_licence_is_read_from_what_a_package_tells(fields, licence):
    assert licences.licence_of(Installed(**fields)) == licence


@pytest.mark.parametrize(
    ("name", "licence", "said"),
    [
        ("a", "MIT", None),
        ("a", "(MIT OR Apache-2.0 WITH LLVM-exception) AND Zlib", None),
        ("a", None, "does not tell its licence"),
        ("a", "GPL-3.0-only", "GPL-3.0-only is not allowed"),
        ("a", "MIT OR LGPL-2.1-or-later", "LGPL-2.1-or-later is not allowed"),
        ("a", "MPL-2.0", "MPL-2.0 is not allowed"),
        ("certifi", "MPL-2.0", None),
        ("certifi", "GPL-3.0-only", "GPL-3.0-only is not allowed"),
        ("nvidia-cublas", None, None),
    ],
)
def test_a_licence_that_is_not_allowed_is_a_fault(name, licence, said):
    fault = licences.find_fault(licences.Package(name, "1", licence, ("runtime",)))
    assert fault is None if said is None else said in fault


def test_every_exception_has_a_reason_and_is_needed():
    for licence, reason in licences.EXCEPTIONS.values():
        assert set(licences.identifiers(licence)) - licences.ALLOWED
        assert len(reason) > 10


def test_what_is_installed_here_may_be():
    packages = licences.list_packages()
    assert {"numpy", "torch", "safetensors"} <= {package.name for package in packages}
    assert [fault for package in packages if (fault := licences.find_fault(package))] == []


# --- audit

SAFE = {"name": "a", "version": "1", "vulns": []}
FLAWED = {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3"]}]}
PASSED_OVER = {"name": "c", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([SAFE, PASSED_OVER], 0, "no known vulnerability in 1 of 2"),
        ([SAFE, FLAWED], 1, "b 2: PYSEC-1, mended in 3"),
        ([PASSED_OVER, PASSED_OVER], 3, "told of none of 2 packages"),
        ([], 3, "nothing is known"),
    ],
)
def test_an_audit_says_what_is_known(packages, code, said):
    got, lines = audit.judge(json.dumps({"dependencies": packages}), "")
    assert got == code
    assert said in lines[0]


@pytest.mark.parametrize("printed", ["", "null", "[]", "{}", "Traceback"])
def test_an_audit_that_broke_off_is_no_clean_one(printed):
    code, (line,) = audit.judge(printed, "Traceback\nConnectionError: no route\n")
    assert code == audit.UNKNOWN
    assert "ConnectionError: no route" in line


# --- what SECURITY.md says of the source


def calls():
    """Yield (file, name, call) of every call in the source, such as ('artifact.py', 'json.loads', ...)."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield path.name, ast.unparse(node.func), node


def options(call):
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}


def test_nothing_is_unpickled():
    modules = {
        (path.name, name)
        for path in SOURCES
        for name in re.findall(r"^\s*(?:import|from) (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        if name.partition(".")[0]
        in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    }
    assert modules == {("weight_files.py", "pickle")}  # an exception's name
    weights = (ROOT / "src" / "chanscale" / "weight_files.py").read_text(encoding="utf-8")
    assert re.findall(r"import.*pickle.*|from pickle .*", weights) == [
        "from pickle import UnpicklingError  # the exception alone: nothing here unpickles"
    ]


def test_torch_and_numpy_load_without_pickle():
    loads = [
        (name, options(call)) for _, name, call in calls() if name in {"torch.load", "np.load", "numpy.load"}
    ]
    assert {name for name, _ in loads} == {"torch.load", "np.load"}
    for name, given in loads:
        wanted = {"weights_only": "True"} if name == "torch.load" else {"allow_pickle": "False"}
        assert wanted.items() <= given.items()


def test_yaml_is_read_as_plain_values():
    used = [(path, name, call) for path, name, call in calls() if name.startswith("yaml.")]
    plain = {"yaml.safe_load", "yaml.safe_dump", "yaml.load", "yaml.composer.ComposerError"}
    assert {"yaml.safe_load"} < {name for _, name, _ in used} <= plain
    (load,) = [(path, ast.unparse(call.args[1])) for path, name, call in used if name == "yaml.load"]
    assert load == ("config.py", "_Loader")
    assert issubclass(config._Loader, yaml.SafeLoader)


def test_no_text_becomes_code_and_no_shell_is_asked():
    names = {name for _, name, _ in calls()}
    assert not names & {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}
    shells = [path for path, _, call in calls() if options(call).get("shell") == "True"]
    assert shells == []


def test_the_network_is_asked_for_weights_and_the_runtime_alone():
    asking = {
        path for path, name, _ in calls() if name.endswith(("urlopen", "urlretrieve", "hf_hub_download"))
    }
    assert "weight_sources.py" in asking
    assert asking <= {"weight_sources.py", "web.py", "libraries.py", "catalogue.py"}
    imported = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert not re.search(
        r"^\s*(?:import|from) (?:requests|httpx|aiohttp|socket|smtplib|sentry_sdk)\b", imported, re.MULTILINE
    )


def test_the_policy_names_every_kind_of_file_that_is_read():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for word in (
        "PNG",
        "JPEG",
        "TIFF",
        "DICOM",
        ".csv",
        ".npz",
        "config.yaml",
        "safetensors",
        ".pth",
        "program.pt2",
    ):
        assert word in text
