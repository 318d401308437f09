"""Faults of a fleet of programs on this machine, each several times: benchmarks/results/faults.md and .json.

    python benchmarks/faults.py                        the test of each fault ten times (2 hours on 2 cores)
    python benchmarks/faults.py --only edge cut        some of them
    python benchmarks/faults.py --times 3              less often

Runs the tests of faults, each time with other moments, and writes down what came of each. What is in faults.json is not
run again; delete that file to start afresh. The network is cut with network namespaces, which needs root.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from fleetfit.core.files import write_atomically

RESULTS = Path(__file__).parent / "results"
TESTS = Path(__file__).parent.parent / "tests" / "engines"
PROGRAMS, REPLIES = TESTS / "flower" / "test_deployment_faults.py", TESTS / "test_faults.py"
UNDISTURBED = "all models and figures are those of an undisturbed run"
AWAY = "all models and figures are those of the local engine when the same replies are lost"


class Fault(NamedTuple):
    """A fault and its test.

    Attributes:
        what: In words.
        strikes: How often it happens in one run of the test.
        file: Of the test.
        test: Its name.
        meaning: Of a pass.
    """

    what: str
    strikes: int
    file: Path
    test: str
    meaning: str


FAULTS = {
    "device": Fault(
        "a device is killed mid-round and started again, one in each of three rounds",
        3,
        PROGRAMS,
        "test_devices_that_are_killed_mid_round_go_on",
        UNDISTURBED,
    ),
    "devices": Fault(
        "two of five devices are killed mid-round: in the first round, and come back; in the last, and stay away",
        2,
        PROGRAMS,
        "test_with_two_of_five_devices_killed_the_others_go_on",
        f"the others finish, who did not is listed, {AWAY}",
    ),
    "edge": Fault(
        "an edge is killed and started again, at three points",
        3,
        PROGRAMS,
        "test_an_edge_that_is_killed_at_three_points_goes_on",
        UNDISTURBED,
    ),
    "cloud": Fault(
        "the cloud is killed and started again, at three points",
        3,
        PROGRAMS,
        "test_a_cloud_that_is_killed_at_three_points_goes_on",
        UNDISTURBED,
    ),
    "cut": Fault(
        "the network of one edge is cut for a minute, from the cloud and from its devices, two times",
        2,
        PROGRAMS,
        "test_an_edge_whose_network_is_cut_for_a_minute_goes_on",
        UNDISTURBED,
    ),
    "liar": Fault(
        "a device sends damaged replies through the door of its edge, five or more",
        5,
        PROGRAMS,
        "test_a_device_that_lies_harms_no_other",
        f"none is used, all are named, the others finish, {AWAY}",
    ),
    "fuzz": Fault(
        "308 fuzzed replies, in one process",
        1,
        REPLIES,
        "test_whatever_a_device_sends_it_harms_no_other",
        "200 or more are refused and named; each step's result is that of a step without that device",
    ),
}
FLEETS = (("device", "edge", "cloud"), ("devices", "liar"), ("cut",), ("fuzz",))  # who shares one; one at a time
HEAD = """\
# Faults

`python benchmarks/faults.py{options}` runs the test of each fault {times} times, each time with other moments, drawn
from a seed; some faults happen several times in one run. It can be stopped and goes on. Seconds are with all that the
machine did beside it, and with the waiting that a fault is about.
The fleet: programs on one machine of {cores} cores, over TLS with node keys; a cloud, two edges, three devices (five
where two are killed, and where one lies); a tiny job on digits. Models must be equal within 1e-5.

"""


class Collector:
    """Writes down each test as soon as it is over.

    Args:
        path: Where. Another process may do the same there, with other faults.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One phase of one test is over; of those that are well, only the test itself counts."""
        if report.when != "call" and report.passed:
            return
        test, _, repetition = report.nodeid.rpartition("::")[2].rstrip("]").partition("[")
        (fault,) = (name for name, known in FAULTS.items() if known.test == test)
        happened: dict[str, Any] = {"outcome": report.outcome, "seconds": round(report.duration, 1)}
        for key, value in report.user_properties:
            happened[key] = f"{happened[key]}; {value}" if key in happened else value
        if not report.passed:
            happened["why"] = str(report.longrepr)[-2000:]
        found = read(self.path)
        found.setdefault(fault, {})[repetition] = happened
        write_atomically(self.path, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """What is there already, by fault and repetition."""
    found: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """One row for each fault."""
    lines = [
        "| fault | runs | passed | it happened in these | median seconds of a run | passed means |",
        "|---|---|---|---|---|---|",
    ]
    for name, fault in FAULTS.items():
        runs = list(found.get(name, {}).values())
        passed = sum(run["outcome"] == "passed" for run in runs)
        seconds = f"{statistics.median(run['seconds'] for run in runs):.0f}" if runs else "–"
        cells = (fault.what, len(runs), passed, f"{passed * fault.strikes} times", seconds, fault.meaning)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def moments(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """What happened in each run."""
    lines = []
    for name, fault in FAULTS.items():
        runs = found.get(name, {})
        lines += ["", f"## {fault.what[0].upper()}{fault.what[1:]}", ""] if runs else []
        for number, run in sorted(runs.items(), key=lambda item: int(item[0])):
            told = [f"{k}: {v}" for k, v in run.items() if k not in ("outcome", "seconds", "why")]
            lines.append(f"- {int(number) + 1}: {run['outcome']} in {run['seconds']:.0f} s; {'; '.join(told)}")
    return lines


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "faults", help="without the ending")
    options = parser.parse_args()
    os.environ["FLEETFIT_TIMES"] = str(options.times)
    path = options.out.with_suffix(".json")
    found = read(path)
    wanted = [
        f"{FAULTS[name].file}::{FAULTS[name].test}[{number}]"
        for fleet in FLEETS
        for number in range(options.times)
        for name in fleet
        if name in options.only and str(number) not in found.get(name, {})
    ]
    code = pytest.main(["-m", "", "--tb=short", *wanted], plugins=[Collector(path)]) if wanted else 0
    found = read(path)
    said = "" if options.times == parser.get_default("times") else f" --times {options.times}"
    head = HEAD.format(options=said, times=options.times, cores=os.cpu_count())
    write_atomically(options.out.with_suffix(".md"), head + "\n".join([*table(found), *moments(found)]) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
