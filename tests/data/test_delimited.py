"""Tables as text: every value as it is written; what a reader could only guess is an error with file and line."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.data.delimited import read_delimited
from fleetfit.data.file_rows import FileRows


def written(folder: Path, content: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, content: str | bytes, name: str = "rows.csv", **keys: str) -> FileRows:
    return read_delimited(written(folder, content, name), **keys)


def rows_of(found: FileRows) -> list[tuple[str, ...]]:
    return list(zip(*found.columns.values(), strict=True))


# -- values -----------------------------------------------------------------------------------------------------------


def test_values_stay_as_they_are_written(tmp_path: Path) -> None:
    values = ["007", "7", "7.0", "1e3", "1000", "NA", "N/A", "null", "None", "nan", "true", "TRUE", "-", "#N/A", "+7"]
    found = read(tmp_path, "code,kind\n" + "".join(f"{v},x\n" for v in values))
    assert list(found.columns["code"]) == values
    assert (found.as_text, found.blank_rows, found.notes) == (True, 0, ())


def test_quoted_values_may_hold_separators_quotes_and_line_ends(tmp_path: Path) -> None:
    found = read(tmp_path, 'text,label\n"a, b",x\n"she said ""no""",y\n"two\r\nlines, I say",x\n5" nail,y\n')
    assert list(found.columns["text"]) == ["a, b", 'she said "no"', "two\r\nlines, I say", '5" nail']
    assert list(found.columns["label"]) == ["x", "y", "x", "y"]


def test_quotes_after_a_blank_are_quotes(tmp_path: Path) -> None:
    assert rows_of(read(tmp_path, 'a, b\n"x", "y, z"\n"u", "v"\n')) == [("x", "y, z"), ("u", "v")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines(tmp_path: Path, end: str) -> None:
    found = read(tmp_path, end.join(["text,label", "one\u2028line\x0cof\x85mine,a", "two,b", ""]))
    assert rows_of(found) == [("one\u2028line\x0cof\x85mine", "a"), ("two", "b")]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(*[st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)] * 2),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(",;\t|"),
)
def test_what_pythons_writer_wrote_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], separator: str
) -> None:
    """Whatever the values are: as they were, or an error; rows of nothing but space are left out."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    path = written(tmp_path_factory.mktemp("csv"), file.getvalue())
    try:
        found = read_delimited(path)
    except ValueError as error:
        assert "looks like rows of their own" in str(error)  # noqa: PT017  (whether it is raised hangs on the example)
        return
    assert rows_of(found) == [row for row in rows if any(value.strip() for value in row)]


# -- rows and headers that do not fit ---------------------------------------------------------------------------------

GOOD = "text,label\ngood,yes\nbad,no\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("text,label\ngood,yes,7\nbad,no,8\n", "line 2: the row has 3 fields, and the header 2: 'text', 'label'"),
        (GOOD + "fine,yes,\nodd,no,3\n", "line 5: the row has 3 fields"),
        (GOOD + "torn by an\nend of line,yes\n", "line 4: the row has 1 field, and the header 2"),
        ("text,label\n1,good,yes\n2,bad,no\n", "line 2: the row has 3 fields"),
        (
            GOOD + '"a, b",no\n"never closed,yes\nbad,no\n',
            "line 5: a quote opens here or in a line above and is never closed",
        ),
        (GOOD + '"open" and on,"yes"\n', "a quote inside a quoted field must be written twice"),
        ("text,label,label\na,b,c\n", "line 1: the header has 'label' more than once"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        (",,\n,,\n", "no row has a value"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read(tmp_path, content)
    assert says in str(caught.value)
    assert str(tmp_path / "rows.csv") in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        '"a, b",yes\n"good one,yes\nbad one,no\nlate one,no\nsaid so",yes\nz,no\n',
        '"a, b",yes\nb,no\n"good one,yes\nbad one",no\n',
    ],
)
def test_rows_that_a_stray_quote_swallows_are_told(tmp_path: Path, body: str) -> None:
    with pytest.raises(
        ValueError, match=r"a quote that opens here closes only in line \d, and what it holds looks like"
    ):
        read(tmp_path, "text,label\n" + body)


def test_rows_that_a_stray_quote_swallows_in_the_last_column_are_told(tmp_path: Path) -> None:
    body = 'yes,"fine, really"\nno,bad\nyes,"5 inch\nno,worse\nyes,late\n7 inch"\n'
    with pytest.raises(ValueError, match=r"rows\.csv, line 4: a quote that opens here closes only in line 7"):
        read(tmp_path, "label,text\n" + body)


def test_swallowed_rows_are_told_also_where_one_of_them_has_a_value_of_its_own(tmp_path: Path) -> None:
    rows = [f"t{i},{'ab'[i % 2]}" for i in range(20)]
    rows[4:7] = ['"t4,a', "t5,once", 't6",a']
    with pytest.raises(ValueError, match=r"rows\.csv, line 6: a quote that opens here closes only in line 8"):
        read(tmp_path, "text,label\n" + "\n".join([*rows, '"x, y",b']))


def test_a_text_over_several_lines_is_a_text(tmp_path: Path) -> None:
    texts = ["Dear all,\nI am, as ever,\nyours", "first line\n\nthird line", "a, b\nc, d, e\nf"]
    body = "".join(f'"{text}",{label}\n' for text, label in zip(texts, ("yes", "no", "yes"), strict=True))
    assert list(read(tmp_path, "text,label\n" + body + "x,no\n").columns["text"]) == [*texts, "x"]


def test_quotes_that_are_no_quotes(tmp_path: Path) -> None:
    """Where no value is quoted as a whole, an opening quote is a sign like others, and that is told."""
    found = read(tmp_path, 'text,label\n"so it begins,yes\n"and again,no\nbad,no\n')
    assert list(found.columns["text"]) == ['"so it begins', '"and again', "bad"]
    assert found.notes == ("quotes in rows.csv are signs like others: they do not pair",)
    found = read(tmp_path, 'text,label\na,yes\n"good one,yes\nbad one,no\nsaid so",yes\nz,no\n')
    assert list(found.columns["text"]) == ["a", '"good one', "bad one", 'said so"', "z"]


def test_empty_ends_of_rows_and_blank_rows_are_dropped(tmp_path: Path) -> None:
    found = read(tmp_path, "text,label,\ngood,yes,\n,,\nbad,no,,\n\n , ,\n")
    assert rows_of(found) == [("good", "yes"), ("bad", "no")]
    assert found.blank_rows == 3


def test_a_column_without_a_name_is_kept_and_told(tmp_path: Path) -> None:
    found = read(tmp_path, "text,,label\ngood,7,yes\n")
    assert list(found.columns) == ["text", "column 2", "label"]
    assert found.notes == ("the header of rows.csv has no name for its column 2",)


# -- separators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "word"), [(",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "bars")])
def test_separators_are_found_and_told(tmp_path: Path, sign: str, word: str) -> None:
    other = ";" if sign != ";" else ","
    found = read(tmp_path, f"text{sign}label\nwell{other} well{sign}yes\nno,really;not|at\tall".split("no,")[0])
    assert rows_of(found) == [(f"well{other} well", "yes")]
    assert found.notes == ((f"fields of rows.csv are divided by {word}",) if word else ())


def test_a_separator_is_the_one_in_which_all_rows_fit(tmp_path: Path) -> None:
    found = read(tmp_path, "text, or note;label\na, b, c;yes\nd;no\n")
    assert list(found.columns) == ["text, or note", "label"]
    assert rows_of(found) == [("a, b, c", "yes"), ("d", "no")]


def test_several_that_fit_are_asked_for(tmp_path: Path) -> None:
    content = "text|a;label|b\nx|1;y|2\n"
    with pytest.raises(ValueError, match=r"line 1: its fields may be divided by semicolons .*, bars .*data\.separator"):
        read(tmp_path, content)
    assert list(read(tmp_path, content, separator=";").columns) == ["text|a", "label|b"]
    assert list(read(tmp_path, "a\tb,c\td\n1\t2,3\t4\n", separator="tab").columns) == ["a", "b,c", "d"]
    with pytest.raises(ValueError, match=r"data\.separator must be one character or 'tab', got '::'"):
        read(tmp_path, GOOD, separator="::")


def test_the_line_that_spreadsheets_write_for_themselves(tmp_path: Path) -> None:
    assert rows_of(read(tmp_path, "sep=;\r\ntext;label\r\na,b;yes\r\n")) == [("a,b", "yes")]
    with pytest.raises(ValueError, match="line 4: the row has 1 field"):
        read(tmp_path, "sep=;\ntext;label\na;yes\nb\n")


# -- encodings --------------------------------------------------------------------------------------------------------

TEXT = "text,label\ncafé naïve façade – “so”,yes\nplain words here,no\n"


@pytest.mark.parametrize(
    ("encoding", "told"),
    [
        ("utf-8", ()),
        ("utf-8-sig", ("rows.csv was read as UTF-8 with BOM",)),
        ("utf-16", ("rows.csv was read as UTF-16",)),
        ("utf-16-le", ("rows.csv was read as UTF-16 without BOM",)),
        ("utf-16-be", ("rows.csv was read as UTF-16 without BOM",)),
        ("utf-32", ("rows.csv was read as UTF-32",)),
        ("cp1252", ("rows.csv was read as cp1252, since it is no UTF-8 (line 2 is 'xt,label café naïve faça' so)",)),
    ],
)
def test_encodings_are_found_and_told(tmp_path: Path, encoding: str, told: tuple[str, ...]) -> None:
    found = read(tmp_path, TEXT.encode(encoding))
    assert list(found.columns) == ["text", "label"]
    assert found.columns["text"][0] == "café naïve façade – “so”"
    assert found.notes == told


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "iso8859-7"])
def test_letters_that_are_of_no_western_language_are_asked_for(tmp_path: Path, encoding: str) -> None:
    word = "επιτέλους" if encoding == "iso8859-7" else "счёт закрыт"
    content = f"text,label\n{word},yes\n{word} {word},no\n".encode(encoding)
    with pytest.raises(ValueError, match=r"is not UTF-8 \(line 2\).*say what it is with data\.encoding"):
        read(tmp_path, content)
    assert read(tmp_path, content, encoding=encoding).columns["text"][0] == word


def test_an_encoding_that_is_given_is_kept_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rows\.csv is not ascii: .*can't decode"):
        read(tmp_path, TEXT, encoding="ascii")
    with pytest.raises(ValueError, match=r"data\.encoding = 'utf-9' is no encoding that Python knows"):
        read(tmp_path, TEXT, encoding="utf-9")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it has zero bytes"):
        read(tmp_path, b"text,label\n\0\1\2\0\3,yes\n")


# -- files that were put together, or are in another encoding than they are said to be -------------------------------


def test_further_headers_are_left_out_and_told(tmp_path: Path) -> None:
    found = read(tmp_path, "text,label\none,a\n\ntext,label\ntwo,b\ntext,c\n")
    assert rows_of(found) == [("one", "a"), ("two", "b"), ("text", "c")]
    assert found.blank_rows == 1
    assert found.notes == ("left out 1 row that repeats the header of rows.csv, the first in line 4",)


def test_two_marks_at_the_beginning_are_no_name(tmp_path: Path) -> None:
    assert list(read(tmp_path, b"\xef\xbb\xbf\xef\xbb\xbftext,label\none,a\n").columns) == ["text", "label"]
    assert list(read(tmp_path, "\ufefftext,label\none,a\n".encode("utf-16")).columns) == ["text", "label"]


def test_lines_in_several_encodings_are_an_error(tmp_path: Path) -> None:
    lines = [f"café {i},x\n" for i in range(4)]
    mixed = b"text,label\n" + "".join(lines).encode() + lines[0].encode("cp1252")
    with pytest.raises(ValueError, match=r"rows\.csv is not UTF-8 \(line 6\), but 4 other lines are"):
        read(tmp_path, mixed)
    # A line can be both by chance: of 20 here, one.
    by_chance = "text,label\n" + "Spaß“,x\n" + "Straße,x\n" * 19
    assert read(tmp_path, by_chance.encode("cp1252")).columns["text"][:2] == ["Spaß“", "Straße"]


@pytest.mark.parametrize(
    ("content", "encoding", "says"),
    [
        ("text,label\ncafé,x\n".encode(), "cp1252", r"is UTF-8 \('xt,label café,x'\), but data\.encoding = 'cp1252'"),
        ("\ufefftext,label\none,x\n".encode(), "latin-1", "begins with the mark of UTF-8, but"),
        ("text,label\none,x\n".encode("utf-16"), "cp1252", "begins with the mark of UTF-16, but"),
    ],
)
def test_an_encoding_that_the_file_contradicts_is_an_error(
    tmp_path: Path, content: bytes, encoding: str, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        read(tmp_path, content, encoding=encoding)


def test_an_encoding_may_say_what_the_file_says(tmp_path: Path) -> None:
    text = "text,label\ncafé,x\n"
    for encoding, content in (("utf8", f"\ufeff{text}".encode()), ("utf-16", text.encode("utf-16")), ("cp1252", None)):
        found = read(tmp_path, content or text.encode(encoding), encoding=encoding)
        assert rows_of(found) == [("café", "x")]


@pytest.mark.parametrize("swallowed", [0, 1, 3])
@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("label,text", "{label},{text}"),
        ("id,label,text", "{i},{label},{text}"),
        ("id,text,label", "{i},{text},{label}"),
        ("text,label", "{text},{label}"),
    ],
)
def test_a_quote_that_opens_and_one_that_closes_later_swallow_nothing(
    tmp_path: Path, header: str, row: str, swallowed: int
) -> None:
    """Each text is there once, as it is nowhere else; only labels come again."""
    texts = [f"t{i}" for i in range(12)]
    texts[3], texts[4 + swallowed] = '"t3', f't{4 + swallowed}"'
    lines = [row.format(i=i, label="no" if i % 2 else "yes", text=text) for i, text in enumerate(texts)]
    found = read(tmp_path, "\n".join([header, *lines, ""]))
    assert found.columns["text"] == texts
    assert found.notes == ("quotes in rows.csv are signs like others: they do not pair",)


@pytest.mark.parametrize(
    ("text", "label", "encoding"),
    [
        ("a long text in English, of many words", "да", "cp1251"),
        ("le café", "été", "mac_roman"),
        ("le café", "été", "cp850"),
        ("zażółć gęślą jaźń and words in English", "źle", "iso8859-2"),
    ],
)
def test_words_that_are_none_in_western_languages_are_no_cp1252(
    tmp_path: Path, text: str, label: str, encoding: str
) -> None:
    content = f'text,label\n"{text}",{label}\n'.encode(encoding)
    with pytest.raises(
        ValueError,
        match=r"as cp1252 it has words like .*, which no Western language has",
    ):
        read(tmp_path, content)
    assert rows_of(read(tmp_path, content, encoding=encoding)) == [(text, label)]


def test_words_of_western_languages_are_cp1252(tmp_path: Path) -> None:
    words = "où l’été à l’école «CAFÉ» ŒUVRE m² „Größe“ Übung ¿Qué ¡Olé! niño São às øl æble ÅRHUS é col·lecció 20 °C"
    words += " which are some of the words that people write among many others; "
    words += "½ naïve… ŠKODA Žižek över två hyvää yötä það á Ærø Straße – €5"
    found = read(tmp_path, f"text,label\n{words},x\n".encode("cp1252"))
    assert rows_of(found) == [(words, "x")]
