import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from chanscale.export.denormals import flushes_denormals

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NIH = (
    "needs 256 px PNGs of NIH ChestX-ray8 in {}: a folder for each class, names that start with the patient "
    "number (https://nihcc.app.box.com/v/ChestXray-NIHCC)"
)
PNEUMONIAMNIST = "needs: curl -L -o {} https://zenodo.org/records/10519652/files/pneumoniamnist.npz"

# A busy machine must not fail a test, and the same code must fail or pass each time.
settings.register_profile(
    "steady", deadline=None, derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _the_processor_computes_as_before() -> Iterator[None]:
    yield
    assert not flushes_denormals()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the machine does not know, as in some containers, and no variable that says where to keep things."""

    def know_nobody(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "CHANSCALE_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", know_nobody)


@pytest.fixture(scope="session")
def nih_opacity() -> Path:
    """Real chest radiographs, no_finding and pneumonia; skips the test where they are absent."""
    return _require(SHARED / "nih-opacity", NIH)


@pytest.fixture(scope="session")
def pneumoniamnist() -> Path:
    """PneumoniaMNIST as one .npz; skips the test where it is absent."""
    return _require(SHARED / "pneumoniamnist.npz", PNEUMONIAMNIST)


def _require(path: Path, reason: str) -> Path:
    if not path.exists():
        pytest.skip(reason.format(os.path.relpath(path)))
    return path
