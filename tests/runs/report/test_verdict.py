"""The verdict, the rows and the next commands, from a summary made by hand."""

from pathlib import Path
from typing import Any

import pytest

from fleetfit.core.records import ONE_CLASS_NOTE
from fleetfit.runs.report.summary import read_summary
from fleetfit.runs.report.verdict import LOOKS, device_rows, listed, next_commands, verdict


def device(name: str, sent: Any = 0.8, alone: Any = 0.9, fleetfit: Any = 0.9, size: int = 60, **more: Any) -> dict:
    return {
        "id": name,
        "cluster": "phones",
        "accuracy_coarse": sent,
        "accuracy_local": alone,
        "accuracy": fleetfit,
        "parameters": 15,
        "size_bytes": size,
        "limit_bytes": 100,
        "notes": [],
        **more,
    }


def summary(*devices: dict, **more: Any) -> Any:
    cluster = {"id": "phones", "limit_bytes": 100, "width": 0.5, "depth": 2, "parameters": 15, "size_bytes": 60}
    return read_summary(
        {
            "method": "fleetfit",
            "seed": 0,
            "reference": {"accuracy": None, "parameters": 100},
            "clusters": [{**cluster, "energy_joules": 1.0, "loss": 1.0, "accuracy": 0.5, "header": "linear"}],
            "devices": list(devices),
            "traffic": {"upload_ratio": None},
            "seconds": {},
            **more,
        }
    )


def said(*devices: dict, **more: Any) -> str:
    return verdict(summary(*devices, **more)).replace("\u00a0", " ")


def looks(*devices: dict, **more: Any) -> list[list[str]]:
    return [[look.kind for look in row.looks] for row in device_rows(summary(*devices, **more))]


def test_all_is_well():
    assert said(device("a"), device("b", 0.7, 0.8, 1.0)) == (
        "All 2 devices have a model within their storage; mean accuracy 95.0 % (75.0 % as sent, 85.0 % fine-tuned "
        "alone); no device ended below as sent or fine-tuned alone."
    )
    assert said(device("a")).startswith("The one device has a model within its storage; ")


def test_who_ended_below_is_named():
    below_sent, below_alone = device("s", sent=0.95, alone=0.9), device("a", sent=0.9, alone=0.95)
    assert said(device("x"), below_sent, below_alone).endswith(
        "; 1 device ended below as sent: s; 1 device ended below fine-tuned alone: a."
    )
    both = [device(f"b{i}", 1.0, 1.0) for i in range(6)]
    assert said(*both).endswith("; 6 devices ended below as sent and fine-tuned alone: b0, b1, b2 and 3 more.")


def test_who_has_no_model_or_one_too_large_is_named():
    left_out = [{"device_id": "tiny", "cluster": "phones", "limit_bytes": 9, "reason": "needs 30 bytes"}]
    absent = [{"id": i, "cluster": "phones", "since": "finish"} for i in ("tiny", "gone", "away")]
    told = said(device("a"), device("fat", size=101), left_out=left_out, absent=absent)
    assert told.startswith(
        "1 of 5 devices has a model within its storage; 1 is over the limit: fat; 1 was left out: tiny; "
        "2 are absent: gone, away; mean accuracy"
    )
    assert said(device("fat", size=101)).startswith("The one device has no model within its storage; ")
    assert said(absent=absent[:1]).startswith("The one device has no model within its storage; 1 is absent: tiny; ")


def test_accuracies_that_are_not_known_or_not_told():
    unknown = device("a", None, None, None)
    assert said(unknown).endswith("; accuracies are not known, since no device has test samples.")
    assert said(unknown, privacy={"epsilon": 1.0}).endswith(
        "; accuracies stay on the devices, as the job’s privacy asks."
    )
    # One that is not known counts in no mean, and is below nothing.
    assert "mean accuracy 90.0 % (80.0 % as sent, 90.0 % fine-tuned alone); no device" in said(unknown, device("b"))


def test_what_to_look_at():
    assert looks(device("a", size=50), device("b", size=49)) == [[], ["unused"]]
    assert looks(device("a", size=100), device("b", size=101)) == [[], ["over"]]
    assert looks(device("a", 0.9, 0.9, 0.9), device("b", 0.91, 0.92, 0.9)) == [[], ["below-sent", "below-alone"]]
    assert looks(device("a", notes=["one training sample"]), device("b", notes=[ONE_CLASS_NOTE])) == [[], ["one-class"]]
    left_out = [{"device_id": "tiny", "cluster": "phones", "limit_bytes": 9, "reason": "r"}]
    assert looks(left_out=left_out, absent=[{"id": "tiny", "cluster": "phones", "since": "s"}]) == [["left-out"]]
    assert {k for kinds in looks(device("b", 0.91, 0.92, 0.9, 49)) for k in kinds} <= LOOKS.keys()


def test_a_row_has_what_the_device_got():
    row = device_rows(summary(device("a", 0.95)))[0]
    assert (row.name, row.cluster, row.width, row.depth, row.room) == ("a", "phones", 0.5, 2, 0.6)
    assert (row.as_sent, row.alone, row.fleetfit) == (0.95, 0.9, 0.9)
    assert row.looks[0].detail == "−5.0 points"


@pytest.mark.parametrize(("number", "words"), [(0, ""), (4, "0, 1, 2, 3"), (5, "0, 1, 2 and 2 more")])
def test_a_list_of_names_stays_short(number: int, words: str):
    assert listed(str(i) for i in range(number)) == words


def test_next_commands_name_a_device_that_is_there_and_can_be_pasted():
    commands = [c.command for c in next_commands(summary(device("a b")), Path("my runs/x"))]
    assert commands == [
        "fleetfit predict 'my runs/x/devices/a b' INPUT",
        "fleetfit export 'my runs/x' --device 'a b'",
        "fleetfit export 'my runs/x' --all",
        "fleetfit report 'my runs/x'",
        "fleetfit init my-job.toml",
    ]
    deployed = [c.command for c in next_commands(summary(device("a"), deployed=True), Path("x"))]
    assert deployed[0] == "fleetfit predict KIT/model INPUT"
    assert not any("export" in command for command in deployed), "the models are on the devices"
    assert next_commands(summary(), Path("x"))[0].command.split()[1] == "report"


def test_a_damaged_summary_is_refused():
    with pytest.raises(ValueError, match="accuracy_coarse"):
        summary({"id": "a"})
