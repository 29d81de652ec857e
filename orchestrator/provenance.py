"""Which code and which libraries made a number."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PROJECT = Path(__file__).parents[1]
_PACKAGES = "torch diffusers transformers peft accelerate safetensors open_clip_torch numpy pillow optuna".split()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results, and the project's commit."""
    found = {"python": platform.python_version(), "commit": _commit()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _commit() -> str:
    """The commit of the working tree, `+changes` if files differ from it; `unknown` outside a git checkout."""
    git = ["git", "-C", str(_PROJECT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)  # noqa: S603
        changes = subprocess.run(  # noqa: S603
            [*git, "status", "--porcelain", "--untracked-files=no"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
