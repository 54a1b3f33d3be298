"""Fixtures that several test files use. Everything here runs on the CPU without network."""

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data beside the checkout (or $CAPTIONER_SHARED); the test skips where it is absent."""
    folder = Path(os.environ.get("CAPTIONER_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "design.md").is_file():
        pytest.skip(f"no shared data at {folder} (set CAPTIONER_SHARED)")
    return folder
