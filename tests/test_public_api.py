import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import chanscale
from chanscale import errors

ERRORS = [item for _, item in inspect.getmembers(errors, inspect.isclass)]


def test_all_is_sorted_and_has_a_home_for_every_name():
    assert chanscale.__all__ == sorted(chanscale.__all__)
    assert chanscale.__all__ == list(chanscale._HOMES)
    assert dir(chanscale) == sorted([*chanscale.__all__, "__version__"])


@pytest.mark.parametrize("name", chanscale.__all__)
def test_every_name_is_that_of_its_home(name):
    home = import_module(f"chanscale.{chanscale._HOMES[name]}")
    assert getattr(chanscale, name) is getattr(home, name)
    assert getattr(home, name).__doc__ or isinstance(getattr(home, name), dict)


def test_type_checkers_see_the_same_homes():
    tree = ast.parse(Path(chanscale.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: line.module for line in block.body for alias in line.names}
    assert homes == {name: f"chanscale.{home}" for name, home in chanscale._HOMES.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'chanscale' has no attribute 'nothing'"):
        chanscale.nothing  # noqa: B018


def test_importing_it_imports_nothing_heavy():
    heavy = {"torch", "numpy", "sklearn", "matplotlib", "pydantic", "lightning_fabric"}
    program = f"import sys, chanscale; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_has_one_root_and_a_place_in_the_tree(error):
    assert issubclass(error, errors.ChanscaleError)
    assert f" {error.__name__} " in f"{errors.__doc__}\n".replace("\n", " ")
