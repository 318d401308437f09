"""Columns and labels: found where they are clear, asked for where not; labels that do not match are told."""

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

from fleetfit.config.sections import DataConfig
from fleetfit.core.randomness import named_generator
from fleetfit.data.columns import Kind, draw_by_class, find_columns, read_users
from fleetfit.data.tables import Table

TYPES = {
    "image": Image(),
    "class": ClassLabel(names=["a", "b"]),
    "text": Value("string"),
    "long text": Value("large_string"),
    "int": Value("int64"),
    "float": Value("float32"),
    "list": Sequence(Value("int64")),
}


def table(**columns: str) -> Table:
    """An empty table of columns of these types."""
    features = Features({name: TYPES[kind] for name, kind in columns.items()})
    return Table(Dataset.from_dict({name: [] for name in columns}, features=features), "", "")


def names(of: Table, config: DataConfig, kind: Kind) -> tuple[str, str]:
    column, label = find_columns(of, config, kind)
    return column.name, label.name


@pytest.mark.parametrize(
    ("kind", "columns", "found"),
    [
        ("image", {"image": "image", "label": "class"}, ("image", "label")),
        ("image", {"x": "image", "kind": "class"}, ("x", "kind")),
        ("image", {"img": "image", "fine_label": "class", "coarse_label": "class"}, ("img", "fine_label")),
        ("image", {"thumb": "image", "image": "image", "id": "int", "target": "int"}, ("image", "target")),
        ("image", {"pixels": "list", "other": "list", "y": "int"}, ("pixels", "y")),
        ("image", {"path": "text", "title": "text", "label": "text"}, ("path", "label")),
        ("text", {"text": "text", "label": "class"}, ("text", "label")),
        ("text", {"anything": "long text", "intent": "text"}, ("anything", "intent")),
        ("text", {"id": "text", "sentence": "text", "Label": "int"}, ("sentence", "Label")),
        ("text", {"question": "text", "text": "text", "category": "text", "class": "class"}, ("text", "class")),
        ("text", {"text": "text", "label": "text", "class": "class", "intent": "text"}, ("text", "label")),
        ("text", {"title": "text", "text": "text", "Label": "int"}, ("text", "Label")),
        ("text", {"__index_level_0__": "text", "words": "text", "y": "int"}, ("words", "y")),
        ("text", {"title": "text", "label": "list", "class": "int"}, ("title", "class")),
    ],
)
def test_columns_are_found_by_type_and_name(kind: Kind, columns: dict[str, str], found: tuple[str, str]) -> None:
    assert names(table(**columns), DataConfig(), kind) == found


def test_what_was_taken_says_why() -> None:
    for config, columns, why in (
        (DataConfig(), {"text": "text", "label": "text"}, ("its name", "its name")),
        (DataConfig(), {"a": "text", "b": "class"}, ("the only column of texts", "its type")),
        (
            DataConfig(input_column="a", label_column="b"),
            {"a": "text", "b": "int"},
            ("data.input_column", "data.label_column"),
        ),
    ):
        found = find_columns(table(**columns), config, "text")
        assert tuple(column.why for column in found) == why


def test_values_of_several_types_are_no_labels() -> None:
    rows = Dataset.from_dict({"text": ["a"]})
    mixed = Table(rows, "", "", mixed={"label": "int (1) and str ('1')"})
    with pytest.raises(ValueError, match=r"the column 'label' holds values of several types: int \(1\) and str"):
        find_columns(mixed, DataConfig(), "text")
    with pytest.raises(ValueError, match=r"data\.label_column = 'label' holds values of several types"):
        find_columns(mixed, DataConfig(label_column="label"), "text")


def test_given_columns_win_and_users_are_no_texts() -> None:
    columns = {"text": "text", "title": "text", "label": "class", "topic": "text", "who": "text"}
    given = DataConfig(input_column="title", label_column="topic")
    assert names(table(**columns), given, "text") == ("title", "topic")
    own = DataConfig(user_column="who")
    assert names(table(words="text", who="text", label="class"), own, "text") == ("words", "label")
    # A label that is a text is not the input, nor the other way round.
    assert names(table(first="text", second="text"), DataConfig(label_column="first"), "text")[0] == "second"
    assert find_columns(table(text="text", label="text"), DataConfig(input_column="label", label_column="text"), "text")


CLEAR = {"image": "image", "label": "class"}
CLEAR_HAS = "there are image (image), label (class label)"


@pytest.mark.parametrize(
    ("kind", "columns", "keys", "says"),
    [
        (
            "text",
            {"a": "text", "b": "text", "label": "class"},
            {},
            "data.input_column must be given: several columns may hold texts: a, b. "
            "The data has a (text), b (text), label (class label)",
        ),
        (
            "text",
            {"x": "image", "label": "class"},
            {},
            "data.input_column must be given: no column holds texts; the model reads texts. "
            "The data has x (image), label (class label)",
        ),
        (
            "image",
            {"words": "text", "label": "class"},
            {},
            "data.input_column must be given: no column holds images; the model reads images. "
            "The data has words (text), label (class label)",
        ),
        (
            "image",
            {"image": "image"},
            {},
            "data.label_column must be given: no column holds labels. The data has image (image)",
        ),
        (
            "image",
            {"image": "image", "a": "class", "b": "class"},
            {},
            "data.label_column must be given: several columns may hold labels: a, b. "
            "The data has image (image), a (class label), b (class label)",
        ),
        (
            "text",
            {"text": "text", "intent": "text", "category": "text"},
            {},
            "data.label_column must be given: several columns may hold labels: intent, category. "
            "The data has text (text), intent (text), category (text)",
        ),
        (
            "text",
            {"question": "text", "sentence": "text", "note": "text"},
            {},
            "data.label_column must be given: no column holds labels; data.input_column must be given: several columns "
            "may hold texts: question, sentence. The data has question (text), sentence (text), note (text)",
        ),
        ("image", CLEAR, {"input_column": "img"}, f"data.input_column = 'img' is no column of the data; {CLEAR_HAS}"),
        ("image", CLEAR, {"user_column": "who"}, f"data.user_column = 'who' is no column of the data; {CLEAR_HAS}"),
    ],
)
def test_what_is_not_clear_is_asked_for(kind: Kind, columns: dict[str, str], keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        find_columns(table(**columns), DataConfig(**keys), kind)
    assert str(caught.value) == says


def test_users_are_numbered_whatever_they_are_called() -> None:
    rows = Dataset.from_dict({"who": ["eve", "bob", "eve", "amy"]})
    assert read_users(Table(rows, "", ""), "who").tolist() == [2, 1, 2, 0]
    rows = Dataset.from_dict({"who": ["eve", None, "eve"]})
    with pytest.raises(ValueError, match=r"data\.user_column = 'who': 1 of 3 values are missing"):
        read_users(Table(rows, "", ""), "who")
    with pytest.raises(ValueError, match="1 of 2 values are missing"):
        read_users(Table(Dataset.from_dict({"who": ["eve", " "]}), "", ""), "who")


def test_drawing_keeps_shares() -> None:
    of = torch.cat([torch.full((n,), c) for c, n in enumerate((600, 300, 90, 10))])
    of = of[torch.randperm(1000, generator=named_generator(0, "order"))]
    for limit in (2, 10, 100, 999):
        rows = draw_by_class(of, limit, named_generator(0, "draw"))
        assert len(rows) == len(set(rows.tolist())) == limit
        assert rows.tolist() == sorted(rows.tolist())
        counts = of[rows].bincount(minlength=4)
        assert (counts - limit * torch.tensor([0.6, 0.3, 0.09, 0.01])).abs().max() <= 1
    one, other = (draw_by_class(of, 100, named_generator(seed, "draw")) for seed in (0, 1))
    assert not torch.equal(one, other)


def test_names_that_the_job_gives_may_be_in_another_case() -> None:
    both = table(Body="text", Note="text", Kind="text")
    assert names(both, DataConfig(input_column="body", label_column="KIND"), "text") == ("Body", "Kind")
    twice = table(body="text", Body="text", label="text")
    assert names(twice, DataConfig(input_column="Body"), "text") == ("Body", "label")
    with pytest.raises(ValueError, match=r"data\.input_column = 'BODY' is no column"):
        find_columns(twice, DataConfig(input_column="BODY"), "text")
