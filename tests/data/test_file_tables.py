"""Files that are read together: joined only where they hold the same, and never a part of them without a word."""

import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Value

from fleetfit.config.sections import DataConfig
from fleetfit.data.tables import Table, open_table

sys.path.insert(0, str(Path(__file__).parent))
from make_data import picture

TEXTS = ["one", "two", "three", "four"]


def opened(source: Path, **data: Any) -> Table:
    return open_table(DataConfig(source=str(source), **data), source.parent / "cache", lambda words: None)


def part(labels: list[Any], feature: Any = None) -> Dataset:
    rows = Dataset.from_dict({"text": TEXTS, "label": labels})
    return rows if feature is None else rows.cast_column("label", feature)


def parquet(folder: Path, **parts: Dataset) -> Path:
    folder.mkdir(exist_ok=True)
    for name, rows in parts.items():
        rows.to_parquet(str(folder / f"{name}.parquet"))
    return folder


AB, BA = ClassLabel(names=["a", "b"]), ClassLabel(names=["b", "a"])


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        (part([0, 1, 0, 1], AB), part([0, 1, 0, 1], BA), "the classes a, b in {}, but the classes b, a in {}"),
        (part([0, 1, 0, 1], AB), part([0, 1, 0, 1]), "the classes a, b in {}, but numbers in {}"),
        (part([0, 1, 0, 1]), part(["0", "1", "0", "1"]), "numbers in {}, but texts in {}"),
        (part([0, 1, 0, 1]), part([True, False, True, False]), "numbers in {}, but bool in {}"),
    ],
)
def test_files_of_other_types_are_not_joined(tmp_path: Path, first: Dataset, second: Dataset, says: str) -> None:
    wanted = "the column 'label' holds " + says.format(r"a\.parquet", r"b\.parquet")
    with pytest.raises(ValueError, match=wanted):
        opened(parquet(tmp_path / "one", a=first, b=second))
    with pytest.raises(ValueError, match="the column 'label' holds"):
        opened(parquet(tmp_path / "two", train=first, test=second))
    DatasetDict(train=first, test=second).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(
        ValueError, match="the column 'label' holds " + says.format("the split train", "the split test")
    ):
        opened(tmp_path / "saved")
    alone = opened(parquet(tmp_path / "two"), splits=["test"])
    assert alone.rows.features["label"] == second.features["label"]


def test_files_of_the_same_kind_are_joined(tmp_path: Path) -> None:
    floats = part([0.0, None, 1.0, 0.0])
    source = parquet(tmp_path / "a", train=part([0, 1, 0, 1]), test=floats, val=part([None] * 4, Value("null")))
    assert opened(source).column("label") == [0, 1, 0, 1, None, None, None, None, 0, None, 1, 0]


def test_splits_that_are_not_wanted_may_have_other_columns(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train.csv").write_text("text,label\none,x\ntwo,y\n")
    (tmp_path / "a" / "test.csv").write_text("id,text\n7,three\n")
    with pytest.raises(ValueError, match=r"test\.csv has the columns 'id', 'text', another file 'text', 'label'"):
        opened(tmp_path / "a")
    assert opened(tmp_path / "a", splits=["train"]).column("label") == ["x", "y"]
    with pytest.raises(ValueError, match="has the columns"):
        opened(tmp_path / "a", splits=["train", "test"])
    (tmp_path / "a" / "test.csv").write_text("text,label\nthree,x\n")
    with pytest.raises(ValueError, match="no split 'dev'; there are train, test"):
        opened(tmp_path / "a", splits=["dev"])


def test_tables_of_several_kinds_are_not_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "train.csv").write_text("text,label\none,x\ntwo,y\n")
    (folder / "test.json").write_text('[{"text": "three", "label": "x"}]')
    for more in ((), ("dev.csv",)):  # also where one kind has more files
        for name in more:
            (folder / name).write_text("text,label\nfour,x\n")
        with pytest.raises(ValueError, match=r"has tables of several kinds: .*'test\.json', 'train\.csv'; say which"):
            opened(folder)
    assert opened(folder / "*.csv").column("text") == ["four", "one", "two"]
    (folder / "test.json").rename(folder / "about.json")
    found = opened(folder)
    assert found.column("label") == ["x", "y", "x"]
    assert found.left_out == {"files that are no data here (.json)": 1}


def test_what_programs_lay_beside_open_files_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.csv").write_text("text,label\none,x\ntwo,y\n")
    (tmp_path / "a" / "~$rows.xlsx").write_bytes(b"lock")
    assert opened(tmp_path / "a").left_out == {}


def test_whole_numbers_and_others_in_one_column_of_json_are_several_types(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1E2}\n{"text": "y", "label": 100}\n')
    assert opened(tmp_path / "a.jsonl").mixed == {"label": "float (100.0) and int (100)"}
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": NaN}\n')
    assert opened(tmp_path / "a.jsonl").column("label") == [1, None]


CARD = "---\nlicense: mit\n---\n# A set\n"


@pytest.mark.parametrize(
    "content",
    [
        "text,label\none,01\ntwo,1\n",
        "text,label\none,01,\ntwo,1,\n",
        "text, label\none,01\ntwo,1\n,\n",
        "text;label\none;01\ntwo;1\n",
        "text,label\none,01\ntext,label\ntwo,1\n",
        b"\xff\xfe" + "text\tlabel\none\t01\ntwo\t1\n".encode("utf-16-le"),
    ],
)
def test_a_copy_with_a_card_is_read_as_other_files_are(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "README.md").write_text(CARD)
    (tmp_path / "a" / "train.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = opened(tmp_path / "a")
    assert {name: found.column(name) for name in found.rows.features} == {"text": ["one", "two"], "label": ["01", "1"]}


def test_a_card_says_which_files_are_of_which_split_and_how_they_are_divided(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    says = "configs:\n- config_name: default\n  sep: '|'\n  data_files:\n  - split: mine\n    path: one.csv\n"
    (tmp_path / "a" / "README.md").write_text(f"---\n{says}---\n")
    (tmp_path / "a" / "one.csv").write_text("text,a|label\none,x|u\ntwo,y|v\n")
    (tmp_path / "a" / "two.csv").write_text("text,a|label\nthree,x|u\n")
    assert opened(tmp_path / "a", splits=["mine"]).column("text,a") == ["one,x", "two,y"]


def test_a_copy_of_pictures_with_a_card_has_the_classes_of_other_folders(tmp_path: Path) -> None:
    for i, name in enumerate(("cat/2021", "cat/2022", "dog/2021", "dog/2022")):
        (tmp_path / "a" / name).mkdir(parents=True)
        picture(i).save(tmp_path / "a" / name / "0.png")
    (tmp_path / "a" / "README.md").write_text(CARD)
    assert opened(tmp_path / "a").column("label") == ["cat", "cat", "dog", "dog"]


def test_a_copy_of_typed_files_with_a_card_is_not_joined_where_types_differ(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a", first=part([0, 1, 0, 1], AB), second=part([0, 1, 0, 1], BA))
    (source / "README.md").write_text(CARD)
    with pytest.raises(ValueError, match="the column 'label' holds the classes a, b in"):
        opened(source)


def test_files_without_rows_are_passed_over_and_told_if_there_are_no_others(tmp_path: Path) -> None:
    source = parquet(tmp_path / "a", train=part([0, 1, 0, 1]), test=part([0, 1, 0, 1]).select([]))
    assert opened(source).column("label") == [0, 1, 0, 1]
    for name, content in (("a.json", '{"data": []}'), ("a.csv", "text,label\n"), ("a.jsonl", "{}\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="has no rows"):
            opened(tmp_path / name)
    with pytest.raises(ValueError, match="has no rows"):
        opened(parquet(tmp_path / "b", rows=part([0, 1, 0, 1]).select([])))
