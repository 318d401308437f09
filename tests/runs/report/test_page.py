"""The report: complete, self-contained, escaped; it bears what is missing and names what is damaged."""

import base64
import csv
import hashlib
import html
import json
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fleetfit.config.job import make_job
from fleetfit.core.records import Block, HeaderSpec
from fleetfit.runs.report import build_report
from fleetfit.runs.report.figures import log_ticks, matrix, nice_ticks
from fleetfit.runs.report.header_graph import header_graph, header_words
from fleetfit.runs.report.markup import bytes_text, element, percent, seconds_text

VOID = {"meta", "br", "input"}
LINEAR = {"kind": "linear", "blocks": [], "repeats": 1, "channels": 16, "pooling": 1, "hidden": 0}
CELL = [
    {"input_1": 0, "input_2": 1, "operation_1": "conv3", "operation_2": "identity"},
    {"input_1": 1, "input_2": 0, "operation_1": "downsample", "operation_2": "max_pool"},
]
SEARCHED = {"kind": "blocks", "blocks": CELL, "repeats": 1, "channels": 16, "pooling": 2, "hidden": 32}
SHAPES = [(0.5, 1, 40_000), (0.5, 2, 70_000), (1.0, 1, 90_000), (1.0, 2, 160_000)]


@dataclass
class Page(HTMLParser):
    """What a browser would see: tags in balance, their attributes, all text."""

    open_tags: list[str] = field(default_factory=list)
    attributes: list[tuple[str, str, str | None]] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)
    text: str = ""
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if self.open_tags[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.text += data


def write_run(folder: Path, clusters: dict[str, int], header: dict = LINEAR, **device_fields) -> Path:
    """A finished run in the real format: clusters by name, with their number of devices."""
    job = make_job({"fleet": {"devices": [{"count": n, "storage_limit": 100_000} for n in clusters.values()]}})
    (folder / "cloud").mkdir(parents=True)
    (folder / "job.toml").write_text(job.to_toml())
    trials = [
        {"name": "2 blocks, pooling 2", "spec": SEARCHED, "loss": 0.2, "accuracy": 1.0, "parameters": 3000},
        {"name": "given linear", "spec": LINEAR, "loss": 0.3, "accuracy": 0.9, "parameters": 650},
    ]
    lines: list[dict] = [
        {
            "step": "reference/cloud",
            "config": {},
            "parameters": 200_000,
            "validation_loss": 0.2,
            "validation_accuracy": 0.95,
            "accuracy": 0.94,
            "curve": [2.0, 1.0, 0.5],
        },
        {
            "step": "elastic/cloud",
            "config": {},
            "depth_order": "first",
            "head_importance": [[0.06, 0.05], [0.03, 0.02]],
            "neuron_importance_mean": [0.01, 0.02],
            "curve": [3.0, 2.0],
        },
    ]
    rows, summaries, in_summary = [], [], []
    for cluster, number in clusters.items():
        devices = [
            {
                "device_id": f"{cluster}-{i + 1}",
                "accuracy_coarse": 0.8,
                "accuracy_local": 0.85,
                "accuracy": 0.9,
                "num_train": 30,
                "num_test": 10,
                "parameters": 17_000,
                "size_bytes": 70_000,
                "limit_bytes": 100_000,
                "kept_neurons": 8,
                "neurons": 10,
                "notes": ["one class in its training data"] if i == 0 else [],
                **device_fields,
            }
            for i in range(number)
        ]
        kept = ("accuracy_coarse", "accuracy_local", "accuracy", "parameters", "size_bytes", "limit_bytes", "notes")
        in_summary += [{"id": d["device_id"], "cluster": cluster, **{key: d[key] for key in kept}} for d in devices]
        report = {
            "step": f"finish/{cluster}",
            "seconds": 0.1,
            "bytes": {"device_to_edge": 1234, "edge_to_device": 5678},
            "cluster": cluster,
            "header": header,
            "trials": trials,
            "similarity": [[1 / number] * number] * number,
            "distance": [[0.5] * number] * number,
            "rounds": [{"round": r, "num_samples": 12, "loss_sum": 12 / (r + 1), "num_correct": 6} for r in range(3)],
            "decision": {
                "way": {"header": "refined", "temperature": 1.0, "prior_strength": 3.0, "prior_classes": 2.0},
                "loss_by_way": {"coarse": 1.0, "coarse + prior": 0.8, "refined": 0.6, "refined + prior": 0.4321},
                "groups": [],
                "grouping": "one",
                "silhouettes": {"2": 0.05},
            },
            "devices": devices,
        }
        lines.append(report)
        for i, (width, depth, size) in enumerate(SHAPES):
            rows.append(
                {
                    "cluster": cluster,
                    "width": width,
                    "depth": depth,
                    "loss": 1.0 / (i + 1),
                    "accuracy": 0.6 + 0.1 * i,
                    "energy_joules": 1000.0 * (i + 1),
                    "parameters": size // 4,
                    "size_bytes": size,
                    "zeta": 100.0,
                    "fits": size <= 90_000,
                    "grid_loss": 1 if size <= 90_000 else "",
                    "grid_energy": 1 if size <= 90_000 else "",
                    "grid_size": 1 if size <= 90_000 else "",
                    "on_front": i in (0, 1),
                    "trade_off": 1.0,
                    "trade_off_accuracy": -0.25,
                    "chosen_by": "pareto_grid random optimum" if i == 1 else "smallest" if i == 0 else "",
                    "chosen": i == 1,
                }
            )
        summaries.append(
            {
                "id": cluster,
                "limit_bytes": 100_000,
                "width": 0.5,
                "depth": 2,
                "parameters": 17_500,
                "size_bytes": 70_000,
                "energy_joules": 2000.0,
                "loss": 0.5,
                "accuracy": 0.7,
                "header": header["kind"],
            }
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (folder / "cloud" / "front.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    summary = {
        "method": "fleetfit",
        "seed": 0,
        "reference": {"accuracy": 0.94, "parameters": 200_000},
        "clusters": summaries,
        "devices": in_summary,
        "traffic": {
            "device_to_edge_bytes": 4_000,
            "edge_to_device_bytes": 90_000,
            "edge_to_cloud_bytes": 3_000,
            "cloud_to_edge_bytes": 80_000,
            "raw_data_bytes": 16_000,
            "upload_ratio": 0.25,
        },
        "seconds": {"elastic": 90.0, "reference": 30.0},
        "peak_memory_bytes": 600_000_000,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def read_page(run: Path) -> Page:
    page = Page()
    page.feed(build_report(run).read_text(encoding="utf-8"))
    page.close()
    assert page.open_tags == []
    return page


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {"phones": 3, "boxes": 2})


def test_one_page_that_tells_everything(run: Path):
    assert build_report(run) == run / "report.html"
    page = read_page(run)
    for device in ("phones-1", "phones-2", "phones-3", "boxes-1", "boxes-2"):
        assert device in page.text
    words = page.text.replace("\u00a0", " ")
    for fact in (
        "5 of 5",  # within the limit
        "94.0 %",  # reference
        "+10.0 points over the model as sent",
        "+5.0 points over the one fine-tuned alone",
        "70 KB of 100 KB",
        "one class in its training data",
        "refined together + prior",  # decision
        "25.0 % of the raw bytes",
        "2 min 0 s",
        "linear, as distilled",
        "Best searched one, not chosen",
        "max pool",
        "seed = 0",  # the job
    ):
        assert fact in words, fact


def test_what_was_read_of_many_classes_in_folders(run: Path):
    """The first classes with their counts, how many there are more, and no word of a column that there is not."""
    path = run / "summary.json"
    read = {
        "source": "photos",
        "origin": "photos",
        "kind": "image",
        "num_files": 100,
        "num_rows": 100,
        "num_samples": 99,
        "left_out": {"images that cannot be read": 1},
        "label_why": "the first folder whose names differ",
        "classes": {f"class-{number}": number for number in range(25)},
        "notes": ["one <i>note</i>"],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data": read}))
    words = read_page(run).text
    assert "99 samples of 100 images from photos. Left out: 1 image that cannot be read." in words
    assert "Samples of 25 classes; 5 more are in summary.json" in words
    assert "class-19" in words
    assert "class-20" not in words
    assert "the first folder whose names differ" in words
    assert "column" not in words.partition("How it was read")[2].partition("What each cluster got")[0]
    assert "one <i>note</i>" in words


def test_wall_time_and_cpu_time_are_told_apart_by_name(run: Path):
    path = run / "summary.json"
    summary = json.loads(path.read_text())

    def told(**more: object) -> str:
        path.write_text(json.dumps(summary | more))
        return read_page(run).text.replace("\u00a0", " ")

    before = told()  # a folder of an earlier version
    assert "2 min 0 s of wall time, clusters added up" in before
    assert "of CPU time" not in before
    whole = told(cpu_seconds={"elastic": 170.0, "reference": 15.0})
    assert "2 min 0 s of wall time, 3 min 5 s of CPU time, clusters added up" in whole
    assert "2 min 50 s" in whole
    part = told(cpu_seconds={"reference": 15.0})
    assert "15.0 s" in part
    assert "s of CPU time" not in part, "a part is not the whole"


def test_who_was_absent_and_what_was_refused_is_told_only_where_there_is_something(tmp_path: Path, run: Path):
    assert "Did not finish" not in read_page(run).text
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == "finish/boxes":
            line["absent"] = [{"device_id": "boxes-<3>", "since": "round 2"}]
            line["faults"] = [
                {"device_id": "boxes-<3>", "step": "round 2", "reason": "no reply", "times": 3, "recovered": False},
                {"device_id": "boxes-1", "step": "finish", "reason": "<b>", "times": 1, "recovered": True},
            ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read_page(run)
    assert "Did not finish, and got no model: boxes-<3> (since round 2)." in page.text
    for cell in ("boxes-<3>", "round 2", "no reply", "3", "no", "<b>", "yes"):
        assert cell in page.text
    assert "b" in page.tags
    assert "boxes-&lt;3&gt;" in (run / "report.html").read_text()
    # With faults made good, and nobody absent.
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({k: v for k, v in line.items() if k != "absent"}) + "\n" for line in lines)
    )
    page = read_page(run)
    assert "Did not finish" not in page.text
    assert "missing or refused" in page.text


def test_it_begins_with_the_verdict_then_devices_then_commands_then_the_story(run: Path):
    page = read_page(run)
    order = [
        "All 5 devices have a model within their storage; mean accuracy 90.0\u00a0% (80.0\u00a0% as sent, 85.0\u00a0% "
        "fine-tuned alone); no device ended below as sent or fine-tuned alone.",
        "Every device",
        "What to do next",
        "One model, 5 devices, 2 clusters",
        "How the models came about",
        "Words and symbols",
    ]
    places = [page.text.find(words) for words in order]
    assert -1 not in places
    assert places == sorted(places)
    closed = (run / "report.html").read_text().partition('id="glossary"')[2]
    assert closed.partition("<summary>")[0].endswith("<details>\n"), "until asked for"


def test_the_table_of_devices_says_of_each_what_it_got_and_what_to_look_at(tmp_path: Path):
    path = write_run(tmp_path / "run", {"phones": 3})
    summary = json.loads((path / "summary.json").read_text())
    summary["devices"][0] |= {"accuracy": 0.7, "size_bytes": 40_000}
    summary["left_out"] = [{"device_id": "tiny", "cluster": "phones", "limit_bytes": 900, "reason": "needs <9 KB>"}]
    summary["absent"] = [{"id": "gone", "cluster": "phones", "since": "round 2"}]
    (path / "summary.json").write_text(json.dumps(summary))
    table = read_rows(path)
    assert table["phones-1"] == [
        *("phones", "0.5 × 2", "40 % 40 KB / 100 KB", "80.0 %", "85.0 %", "70.0 %"),
        "worse than as sent: −10.0 points worse than fine-tuned alone: −15.0 points unused storage one class only",
    ]
    assert table["phones-2"] == ["phones", "0.5 × 2", "70 % 70 KB / 100 KB", "80.0 %", "85.0 %", "90.0 %", ""]
    assert table["tiny"] == ["phones", "–", "– / 900 bytes", "–", "–", "–", "left out: needs <9 KB>"]
    assert table["gone"] == ["phones", "–", "–", "–", "–", "–", "absent: since round 2"]
    page = read_page(path)
    options = [value for tag, name, value in page.attributes if tag == "option"]
    assert options == ["", "any", "left-out", "absent", "below-sent", "below-alone", "unused", "one-class"]
    assert "anything to look at (3)" in page.text
    looks = [value for tag, name, value in page.attributes if tag == "tr" and name == "data-look"]
    assert looks == ["below-sent below-alone unused one-class", "left-out", "absent"]


def read_rows(run: Path) -> dict[str, list[str]]:
    """The table of devices as a reader sees it: cells by device."""
    text = build_report(run).read_text(encoding="utf-8")
    body = text.partition('id="fleet-table"')[2].partition("<tbody>")[2].partition("</tbody>")[0]
    rows = {}
    for row in body.split("<tr")[1:]:
        cells = []
        for cell in row.replace("<th scope", "<td scope").split("<td")[1:]:
            seen = Page()
            seen.feed("<td" + cell.partition("</t")[0].replace("<span", " <span"))
            cells.append(" ".join(seen.text.split()))
        rows[cells[0]] = cells[1:]
    return rows


def test_the_only_script_that_may_run_is_the_pages_own(run: Path):
    page = read_page(run)
    policy = next(v for t, n, v in page.attributes if t == "meta" and n == "content" and "script-src" in (v or ""))
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


CLICKS = """
const cells = (column) => Array.from(document.querySelectorAll("#fleet-table tbody tr"), (row) => row.hidden ? "-" :
  row.cells[column].textContent).join(",");
const press = (column) => document.querySelectorAll("#fleet-table thead button")[column].click();
const said = [document.getElementById("fleet-tools").hidden];
press(0); said.push(cells(0)); press(0); said.push(cells(0));
press(6); said.push(cells(6)); press(6); said.push(cells(6));
const [find, look] = [document.getElementById("fleet-find"), document.getElementById("fleet-look")];
press(0); press(0); press(0);
find.value = "WORSE phones-1"; find.dispatchEvent(new Event("input")); said.push(cells(0));
find.value = ""; look.value = "absent"; look.dispatchEvent(new Event("change")); said.push(cells(0));
said.push(document.getElementById("fleet-shown").textContent);
document.title = JSON.stringify(said);
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium")
def test_devices_are_sorted_and_filtered_in_a_browser(tmp_path: Path):
    path = write_run(tmp_path / "run", {"phones": 10})
    summary = json.loads((path / "summary.json").read_text())
    summary["devices"] = [summary["devices"][i] for i in (9, 0, 1)]
    summary["devices"][0]["accuracy"], summary["devices"][1]["accuracy"] = 1.0, 0.75
    summary["absent"] = [{"id": "gone", "cluster": "phones", "since": "round 2"}]
    (path / "summary.json").write_text(json.dumps(summary))
    text = build_report(path).read_text(encoding="utf-8")
    clicked = text.replace('http-equiv="Content-Security-Policy"', "").replace(
        "</body>", f"<script>{CLICKS}</script></body>"
    )
    (tmp_path / "clicked.html").write_text(clicked, encoding="utf-8")
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    seen = subprocess.run(
        ["chromium", *quiet, "--dump-dom", (tmp_path / "clicked.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said = json.loads(
        html.unescape(seen.stdout.partition("<title>")[2].partition("</title>")[0]).replace("\u00a0", " ")
    )
    assert said == [
        False,
        "gone,phones-1,phones-2,phones-10",
        "phones-10,phones-2,phones-1,gone",
        "75.0 %,90.0 %,100.0 %,–",
        "100.0 %,90.0 %,75.0 %,–",
        "-,phones-1,-,-",
        "gone,-,-,-",
        "1 of 4 devices",
    ]


@pytest.mark.parametrize(("number", "opened"), [(1, True), (8, True), (9, False)])
def test_figures_of_many_clusters_are_closed_behind_a_table(tmp_path: Path, number: int, opened: bool):
    text = build_report(write_run(tmp_path / "run", {f"site{i}": 2 for i in range(number)})).read_text()
    assert (f"<summary>Figures of {number} cluster" not in text) == opened
    assert ("Every cluster; accuracies are means of its devices" not in text) == opened


def test_nothing_is_loaded_from_elsewhere(run: Path):
    page = read_page(run)
    assert page.tags.isdisjoint({"link", "img", "iframe", "object", "image", "use"})
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
    links = [value or "" for _, name, value in page.attributes if name in loading]
    assert links
    assert all(link.startswith("#") for link in links)
    ids = {value for _, name, value in page.attributes if name == "id"}
    assert {link[1:] for link in links} <= ids
    text = (run / "report.html").read_text()
    assert "@import" not in text
    assert "url(" not in text
    assert not any(name.startswith("on") for _, name, _ in page.attributes)


def test_figures_say_what_they_show(run: Path):
    page = read_page(run)
    labels = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    hidden = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-hidden"]
    assert len(labels) + len(hidden) == sum(tag == "svg" and name == "viewbox" for tag, name, _ in page.attributes)
    assert all(labels)


def test_hostile_names_are_escaped(tmp_path: Path):
    name = "<script>alert(1)</script>\"'&<img src=x>"
    page = read_page(write_run(tmp_path / "<b>run", {name: 2}))
    assert page.tags.isdisjoint({"img", "b>run"})
    assert len(page.scripts) == 1, "the page's own"
    assert "alert" not in page.scripts[0]
    assert name in page.text
    assert f"{name}-2" in page.text


def test_unknown_accuracies_are_dashes(tmp_path: Path):
    unknown = {"accuracy_coarse": None, "accuracy_local": None, "accuracy": None}
    run = write_run(tmp_path / "run", {"phones": 2}, **unknown, num_test=0)
    page = read_page(run)
    assert "No device has test samples, so accuracies are not known." in page.text
    assert "nan" not in page.text.lower().replace("nano", "")


def test_unknown_scores_do_not_break_it(run: Path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    report = lines[2]
    report["decision"] = {"way": {"header": "coarse"}, "loss_by_way": {}}
    report["trials"][0]["loss"] = None  # as pydantic writes NaN
    report["rounds"] = [{"round": 0, "num_samples": 0, "loss_sum": 0.0, "num_correct": 0}]
    report["similarity"] = [[1.0]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "No device has validation samples" in read_page(run).text


def test_a_model_over_its_limit_is_said_so(tmp_path: Path):
    page = read_page(write_run(tmp_path / "run", {"phones": 2}, size_bytes=120_000))
    assert "None of 2 devices has a model within its storage; 2 are over the limit: phones-1, phones-2;" in page.text
    assert "over its limit" in page.text


@pytest.mark.parametrize("header", [{**LINEAR, "kind": k} for k in ("mlp", "cnn_add", "resmlp")] + [SEARCHED])
def test_every_kind_of_header_is_drawn(tmp_path: Path, header: dict):
    page = read_page(write_run(tmp_path / "run", {"phones": 2}, header=header))
    assert "Chosen for phones" in page.text
    assert ("Best searched one, not chosen" in page.text) == (header["kind"] != "blocks")


def test_a_thousand_devices(tmp_path: Path):
    run = write_run(tmp_path / "run", {f"site{i}": 50 for i in range(20)})
    page = read_page(run)
    assert "site19-50" in page.text
    assert (run / "report.html").stat().st_size < 1_500_000


@pytest.mark.parametrize("name", ["job.toml", "summary.json", "metrics.jsonl", "cloud/front.csv"])
def test_missing_files_are_named(run: Path, name: str):
    (run / name).unlink()
    with pytest.raises(ValueError, match=Path(name).name):
        build_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["job.toml", "summary.json", "metrics.jsonl", "cloud/front.csv"])
@pytest.mark.parametrize("content", [b"{nonsense", b"\xff\xfe", b"[1, 2]", b""])
def test_damaged_files_are_named(run: Path, name: str, content: bytes):
    if name == "job.toml" and content == b"":
        pytest.skip("an empty job is a valid one")
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=Path(name).name):
        build_report(run)


def test_an_unfinished_run_is_refused(run: Path):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no step 'finish/boxes'"):
        build_report(run)


def test_blocks_that_cannot_be_are_refused(tmp_path: Path):
    broken = {**SEARCHED, "blocks": [{**CELL[0], "input_1": 7}]}
    with pytest.raises(ValueError, match=r"metrics\.jsonl is corrupt"):
        build_report(write_run(tmp_path / "run", {"phones": 2}, header=broken))


def test_header_graph_wires():
    spec = HeaderSpec(kind="blocks", blocks=tuple(Block.model_validate(b) for b in CELL), pooling=2)
    drawing = header_graph("a header", spec)
    # Two chips a block; an arrow into each, two into the mean of both loose ends, pooling, and two into the classifier.
    assert drawing.count('class="chip"') == 4
    assert drawing.count('class="arrow"') == 4 + 2 + 1 + 2
    assert "mean of 1, 2" in drawing
    assert "block 2 adds halve grid of the penultimate layer and max pool of the backbone output" in header_words(spec)
    again = header_graph("a header", spec.model_copy(update={"repeats": 2}))
    assert "cell, 2 times in a row" in again


def test_matrix_shades_by_its_largest_entry():
    drawing = matrix("weights", [[1.0, 0.0], [0.5, 0.5]])
    assert drawing.count("<path") == 3
    assert 'stroke-opacity="1.00"' in drawing
    assert ">100<" in drawing


def test_ticks_hold_the_data():
    for low, high in ((0.0, 1.0), (0.3, 0.3), (-1.0, 7.0), (1e-6, 2e-6)):
        ticks = nice_ticks(low, high)
        assert len(ticks) >= 2
        assert ticks[0] <= low
        assert ticks[-1] >= high
    assert log_ticks(40_000, 210_000) == [50_000, 100_000, 200_000]


def test_elements_escape_and_numbers_are_short():
    assert element("p", "<b>", element("i", "&"), title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    shown = [bytes_text(999), bytes_text(79_248), percent(None), percent(0.125), seconds_text(125), seconds_text(0.5)]
    expected = ["999 bytes", "79.2 KB", "–", "12.5 %", "2 min 5 s", "0.50 s"]
    assert [s.replace("\u00a0", " ") for s in shown] == expected


def test_the_hidden_groups_of_a_simulated_fleet_are_compared_with_what_was_found(tmp_path: Path) -> None:
    from tiny_job import tiny_fields

    import fleetfit
    from fleetfit.runs.report.edge_story import _hidden_groups_words

    apart, average = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], [[1 / 3] * 3] * 3
    assert _hidden_groups_words([0, 0, 1], apart).endswith(
        "2 hidden groups here; who was averaged with whom is exactly these."
    )
    assert "as in these for 1 of 3 pairs of devices" in _hidden_groups_words([0, 0, 1], average)
    assert _hidden_groups_words([None, 0, 1], apart) == ""
    assert _hidden_groups_words([0, 0, 0], average) == ""
    folder = tmp_path / "run"
    fields = tiny_fields(tmp_path / "cache", data={"shift": "labels", "groups": 2})
    fleetfit.run(fields, folder)
    assert "This simulated fleet has 2 hidden groups here" in build_report(folder).read_text()
    (folder / "groups.json").write_text('{"small-1": "one"}')
    with pytest.raises(ValueError, match=r"groups\.json is corrupt"):
        build_report(folder)
