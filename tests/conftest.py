"""What every test has to itself, so that it passes anywhere, and copies of the suite that run side by side do not meet.

``make test`` runs one worker for each core (pytest-xdist), so a test computes in one thread, unless who starts the
suite says otherwise.
"""

import atexit
import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# Nobody's home is written to, and whose it is and whether it is there makes no difference. One for each worker.
HOME = tempfile.mkdtemp(prefix="fleetfit-home-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
os.environ["HOME"] = HOME
for name in [
    n for n in os.environ if n.startswith(("XDG_", "FLEETFIT_")) or n in ("HF_HOME", "HF_HUB_CACHE", "FLWR_HOME")
]:
    del os.environ[name]
try:  # pytest names its folder after the user; with a name that was left over it would be another's
    os.environ["LOGNAME"] = pwd.getpwuid(os.getuid()).pw_name
except KeyError:
    os.environ["LOGNAME"] = str(os.getuid())

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The first call of anything is slow on a busy machine; the same examples every time, and none kept.
settings.register_profile("fleetfit", deadline=None, derandomize=True, database=None)
settings.load_profile("fleetfit")

MOST_WORKERS = 8  # each takes a gigabyte


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: as many as the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Files survive a kill without it; it is for power cuts, and takes most of the time of a run of half a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield
