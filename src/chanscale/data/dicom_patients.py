"""Patients of DICOM files under other names: the same patient has the same one, and no one can turn it back.

A hash alone could be turned back by trying all numbers that a hospital gives, so it takes a secret key.
"""

import hmac
import os
import secrets
from pathlib import Path

from filelock import FileLock

from chanscale.errors import ConfigError
from chanscale.files import user_folder

KEY_VARIABLE = "CHANSCALE_PSEUDONYM_KEY"

_KEY_BYTES = 32
_LEAST_CHARACTERS = 32
_DIGITS = 12  # 48 bits: of a million patients, two share a name with a probability of 0.2 %


def rename_patient(patient: str, *, key: bytes) -> str:
    """Return 12 hexadecimal digits of HMAC-SHA256."""
    return hmac.new(key, patient.encode(errors="surrogatepass"), "sha256").hexdigest()[:_DIGITS]


def load_key() -> bytes:
    """Return the secret key: of CHANSCALE_PSEUDONYM_KEY, else of the user's file, which is made once.

    Raises ConfigError, without the key.
    """
    given = os.environ.get(KEY_VARIABLE)
    if given is None:
        return _load_own_key(key_path())
    if len(given) < _LEAST_CHARACTERS:
        raise ConfigError(
            f"{KEY_VARIABLE} must have {_LEAST_CHARACTERS} characters or more, got {len(given)}; "
            "make one with `openssl rand -hex 32`, or unset it"
        )
    return given.encode(errors="surrogateescape")


def key_path() -> Path:
    """Return where the user's key lies: not in the cache, which may be emptied.

    Raises ConfigError for a user without a home folder.
    """
    folder = user_folder("XDG_DATA_HOME", ".local", "share")
    if folder is None:
        raise ConfigError(
            f"this user has no home folder for the key of patients; set CHANSCALE_HOME to a folder, or {KEY_VARIABLE}"
        )
    return folder / "pseudonym.key"


def _load_own_key(path: Path) -> bytes:
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # of processes that start together, one makes it
                if not path.exists():
                    _make_key(path)
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read or make the key {path} ({error.strerror}); make its folder writable, or set {KEY_VARIABLE}"
        ) from error
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"{path} must hold {_KEY_BYTES} bytes, got {len(key)}; remove it, and it is made anew"
        )
    return key


def _make_key(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    # Of mode 600 from the first byte on; write_atomically would leave it to the umask.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
    temporary.replace(path)
