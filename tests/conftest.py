"""What every test relies on: which tests can run here, and a fair share of the cores for each worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # for the processes that tests start
        os.environ.setdefault("SUBQUAD_COMPILE_WORKERS", str(threads))
    if _interpreting():
        _check_interpreter()


def _check_interpreter() -> None:
    """Kernels decorated before the flag was set stay compiled: then a green run would have tested nothing."""
    try:
        import triton
    except ImportError as error:
        raise pytest.UsageError("TRITON_INTERPRET=1 is set, but triton is not installed") from error
    if isinstance(triton.language.sum, triton.JITFunction):  # triton.knobs would only repeat the variable
        raise pytest.UsageError("TRITON_INTERPRET=1 came after the first import of triton: set it before pytest starts")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {}
    if not torch.cuda.is_available():
        lacking["gpu"] = "needs a CUDA GPU"
    if not _interpreting():
        lacking["interpret"] = "needs TRITON_INTERPRET=1 from the start of the process (test_interpreter.py starts one)"
    for item in items:
        for marker, reason in lacking.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors hold NaN (or the largest integer), so that an output that was never written shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
