"""Every test starts from the same seed, on one thread, with a kernel cache of this run."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

gc.set_threshold(50_000, 20, 100)  # captures make many objects: a seventh of their time
hypothesis.settings.register_profile("default", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of compiled kernels, shared by this run's workers and its subprocesses."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BINCOMPILE_CACHE_DIR", str(folder))
        patch.setenv("BINCOMPILE_MEASURE", "0")  # the first kernel that accepts, whatever the load
        yield folder


@pytest.fixture(autouse=True)
def one_seed_and_one_thread() -> Iterator[None]:
    """Seed 0 and one thread, whatever the test before did."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
