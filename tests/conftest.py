"""What holds for all tests; which of them run beside each other under pytest-xdist (`make test` starts two workers)."""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

# What is imported until all tests are collected stays: it is not searched for garbage, neither now nor later.
gc.disable()

# Set by the readline library, which pytest imports; a user's environment does not have it.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

# Whoever starts the tests behind nohup or & hands ignored signals on, which no child could trap then.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine at work on something else makes no test wrong. GPU machines may lack hypothesis.
with suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("any speed", deadline=None)
    hypothesis.settings.load_profile("any speed")

# The longest first, and last files of a second or two, so that no worker is left alone at the end.
LONGEST = (
    *("tests/slurm/", "tests/engines/test_deepspeed.py", "tests/train/", "tests/engines/", "tests/test_tour.py"),
    *(
        "tests/linalg/test_distributed.py",
        "tests/distributed/",
        "tests/plan/",
        "tests/launch/",
        "tests/cli/",
        "tests/serve/",
    ),
    *("tests/benchmarks/", "tests/method/", "tests/optim/test_properties.py", "tests/lowrank/test_fused.py"),
    *("tests/report/", "tests/doctor/", "tests/test_"),
)
# What its tests share is there once: a file's module-scoped fixtures, the Slurm cluster of a whole folder.
WHOLE_FOLDERS = ("tests/slurm",)

# Whole runs, plans and pages, which take seconds each; and what a module imports if its tests start processes.
SLOW = (
    *(
        "tests/benchmarks/",
        "tests/launch/",
        "tests/plan/",
        "tests/distributed/",
        "tests/report/",
        "tests/serve/",
        "tests/train/",
    ),
    *("tests/cli/test_fuzz.py", "tests/method/test_compile.py", "tests/spectra/test_repair.py"),
)
STARTS_PROCESSES = {"subprocess", "spawn", "mp", "multiprocessing", "Terminal"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave alone what ``-m "not slow ..."`` would import in order to deselect it."""
    path = collection_path.relative_to(config.rootpath).as_posix()
    return True if "not slow" in config.option.markexpr and f"{path}/".startswith(SLOW) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = vars(item.module).keys() if isinstance(item, pytest.Function) else set()
        if item.nodeid.startswith("tests/slurm/"):
            item.add_marker("slurm")
        elif "needs_mpirun" in names:
            item.add_marker("mpi")
        elif item.nodeid.startswith(SLOW) or STARTS_PROCESSES & names:
            item.add_marker("slow")
    items.sort(key=lambda item: next((i for i, start in enumerate(LONGEST) if item.nodeid.startswith(start)), 99))


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test that draws without a seed of its own draws the same every time."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return next((folder for folder in WHOLE_FOLDERS if file.startswith(folder)), file)

    config.option.loadscopereorder = False
    return ByFile(config, log)
