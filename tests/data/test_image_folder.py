"""Folders of images: which folder is the class, what divides, what is no picture; told, or asked for."""

import os
from pathlib import Path

import pytest

from fleetfit.config.sections import DataConfig
from fleetfit.data.image_folder import files_below, is_picture, read_image_folder, without_sidecars
from fleetfit.data.tables import Table, open_table

PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\0\0\0\0:~\x9bU\0\0\0\nIDATx\x9cc`\0\0\0\x02\0\x01H\xaf\xa4q"
    b"\0\0\0\0IEND\xaeB`\x82"
)


def put(folder: Path, *names: str, content: bytes = PNG) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def table(folder: Path, **data: object) -> Table:
    return open_table(DataConfig(source=str(folder), **data), folder.parent / "cache", lambda _: None)  # type: ignore[arg-type]


def classes(folder: Path, class_folder: int | None = None) -> dict[str, str | None]:
    files = files_below(folder)
    found = read_image_folder(folder, files, class_folder)
    return {str(p.relative_to(folder)): c for p, c in zip(found.paths, found.classes, strict=True)}


def grid(*levels: tuple[str, ...]) -> list[str]:
    """A picture in every folder of all combinations of names."""
    names = [""]
    for level in levels:
        names = [f"{name}{part}/" for name in names for part in level]
    return [f"{name}{i}.png" for name in names for i in range(2)]


SESSIONS = [
    ("2021", "2022"),
    ("2024-01-05", "2024-02-11"),
    ("session 1", "session 2"),
    ("day_03", "day_07"),
    ("1", "2"),
]


@pytest.mark.parametrize("sessions", SESSIONS)
def test_sessions_below_the_classes_are_no_classes(tmp_path: Path, sessions: tuple[str, ...]) -> None:
    put(tmp_path, *grid(("ash", "oak", "elm"), sessions))
    found = read_image_folder(tmp_path, files_below(tmp_path))
    assert set(found.classes) == {"ash", "oak", "elm"}
    assert found.why == "the first folder below the source whose names differ"
    assert "taken for sessions, not for classes" in found.notes[0]


@pytest.mark.parametrize(
    "levels",
    [
        (("2021", "2022"), ("ash", "oak")),
        (("north", "south"), ("ash", "oak")),
        (("0", "1", "2"), ("2021", "2022")),
        (("camera 1", "camera 2"), ("day 1", "day 2")),
        (("train", "test", "more"), ("ash", "oak")),
    ],
)
def test_two_levels_that_may_be_the_classes_are_asked_for(tmp_path: Path, levels: tuple[tuple[str, ...], ...]) -> None:
    put(tmp_path, *grid(*levels))
    with pytest.raises(ValueError, match=r"two levels of folders may be the classes.*data\.class_folder = 1 or 2"):
        classes(tmp_path)
    assert set(classes(tmp_path, 1).values()) == set(levels[0])
    assert set(classes(tmp_path, 2).values()) == set(levels[1])
    with pytest.raises(ValueError, match=r"data\.class_folder must be <= 2, the folders in the longest path, got 3"):
        classes(tmp_path, 3)


def test_one_class_alone_with_a_subfolder(tmp_path: Path) -> None:
    put(tmp_path, "ash/1.png", "ash/2.png", "oak/1.png", "oak/2.png", "oak/night/1.png", "oak/night/2.png")
    assert {c for name, c in classes(tmp_path).items() if name.startswith("oak")} == {"oak"}
    assert set(classes(tmp_path).values()) == {"ash", "oak"}


@pytest.mark.parametrize(
    "levels",
    [
        (("trees",), ("ash", "oak")),
        (("trees",), ("2024",), ("ash", "oak")),
        (("ash", "oak"), ("images",)),
        (("data",), ("ash", "oak"), ("images",)),
    ],
)
def test_folders_that_all_share_are_passed_over(tmp_path: Path, levels: tuple[tuple[str, ...], ...]) -> None:
    put(tmp_path, *grid(*levels))
    assert set(classes(tmp_path).values()) == {"ash", "oak"}


@pytest.mark.parametrize(
    "levels",
    [
        (("train", "test"), ("ash", "oak")),
        (("Train", "VAL", "test"), ("ash", "oak")),
        (("ash", "oak"), ("train", "test")),
        (("data",), ("train", "valid"), ("ash", "oak")),
        (("train", "test"), ("ash", "oak"), ("2021", "2022")),
        (("train",), ("ash", "oak")),
    ],
)
def test_splits_in_front_of_classes_and_behind(tmp_path: Path, levels: tuple[tuple[str, ...], ...]) -> None:
    put(tmp_path, *grid(*levels))
    found = read_image_folder(tmp_path, files_below(tmp_path))
    assert set(found.classes) == {"ash", "oak"}
    words = next(level for level in levels if level[0].lower() == "train")
    assert len(set(found.splits)) == len(words)


def test_a_picture_beside_the_folders_has_no_class(tmp_path: Path) -> None:
    put(tmp_path, "cover.png", *grid(("train", "test"), ("ash", "oak")))
    found = classes(tmp_path)
    assert found["cover.png"] is None
    assert set(found.values()) == {None, "ash", "oak"}


def test_one_folder_of_pictures_has_no_classes(tmp_path: Path) -> None:
    assert set(classes(put(tmp_path, "ash/1.png", "ash/2.png")).values()) == {None}
    assert set(classes(put(tmp_path / "flat", "1.png", "2.png")).values()) == {None}


# -- files ------------------------------------------------------------------------------------------------------------


def test_links_to_folders_are_followed_and_circles_told(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", "1.png", "2.png")
    put(tmp_path / "here", "oak/1.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "here" / "ash")
    assert [str(p.relative_to(tmp_path / "here")) for p in files_below(tmp_path / "here")] == [
        *("ash/1.png", "ash/2.png", "oak/1.png")
    ]
    os.symlink(tmp_path / "here", tmp_path / "here" / "oak" / "again")
    with pytest.raises(ValueError, match="again links to a folder that it is in"):
        files_below(tmp_path / "here")


def test_what_systems_leave_behind_is_not_there(tmp_path: Path) -> None:
    put(
        tmp_path,
        "ash/1.png",
        ".DS_Store",
        "ash/Thumbs.db",
        "ash/desktop.ini",
        "__MACOSX/ash/._1.png",
        "ash/.hidden.png",
    )
    put(tmp_path, ".ipynb_checkpoints/1.png", "ash/._1.png")
    assert [p.name for p in files_below(tmp_path)] == ["1.png"]


def test_pictures_are_known_by_their_ending_or_else_by_their_content(tmp_path: Path) -> None:
    put(tmp_path, "a.PNG", "b.jpeg", "c.heic", "d.NEF", "e", "f.123456789", "g.thumb")
    put(tmp_path, "h.txt", "i", "j.pdf", "k.json", content=b"no picture")
    assert [p.name for p in files_below(tmp_path) if is_picture(p)] == [
        "a.PNG",
        "b.jpeg",
        "c.heic",
        "d.NEF",
        "e",
        *["f.123456789"],
    ]


def test_files_that_describe_a_picture_are_none_of_the_data(tmp_path: Path) -> None:
    put(tmp_path, "ash/1.png", "ash/2.png")
    put(tmp_path, "ash/1.json", "ash/2.xml", "ash/3.json", "ash/2.png.json", "classes.json", content=b"{}")
    files = files_below(tmp_path)
    kept = without_sidecars(files, [f for f in files if f.suffix == ".png"])
    assert [p.name for p in kept] == ["1.png", "2.png", "3.json", "classes.json"]


def test_descriptions_beside_all_pictures_have_no_vote(tmp_path: Path) -> None:
    put(tmp_path / "trees", *grid(("ash", "oak")))
    put(tmp_path / "trees", *(n.replace(".png", ".json") for n in grid(("ash", "oak"))), content=b'{"shapes": []}')
    found = table(tmp_path / "trees")
    assert found.rows["label"] == ["ash"] * 2 + ["oak"] * 2
    assert found.left_out == {"files that are no data here (.json)": 4}


def test_pictures_that_cannot_be_read_here_are_rows_all_the_same(tmp_path: Path) -> None:
    put(tmp_path / "trees", "ash/1.png", "ash/2.heic", "oak/3.dng", "oak/4.png", content=b"of another program")
    found = table(tmp_path / "trees")
    assert len(found.rows) == 4
    assert found.notes == (
        "1 picture ends in .dng: read by what they hold, if it can be",
        "1 picture ends in .heic: read by what they hold, if it can be",
    )


# -- tables of metadata -----------------------------------------------------------------------------------------------


def test_metadata_is_read_as_any_table_is(tmp_path: Path) -> None:
    put(tmp_path / "trees", "1.png", "2.png", "3.png", "4.png")
    lines = ["file_name;label;who", "1.png;01;a", "2.png;1;b", "3.png;NA;a", ";;"]
    (tmp_path / "trees" / "metadata.csv").write_text("\n".join(lines))
    found = table(tmp_path / "trees")
    assert found.rows["label"] == ["01", "1", "NA", None]  # the picture without a row has no label
    assert found.rows["who"] == ["a", "b", "a", None]
    assert "1 of 4 pictures are in no table of metadata" in found.notes
    assert found.left_out == {"blank rows of metadata.csv": 1}


def test_metadata_without_labels_leaves_them_to_the_folders(tmp_path: Path) -> None:
    put(tmp_path / "trees", "ash/1.png", "oak/1.png")
    (tmp_path / "trees" / "metadata.csv").write_text("file_name,who\nash/1.png,a\noak/1.png,b\n")
    found = table(tmp_path / "trees")
    assert (found.rows["label"], found.rows["who"]) == (["ash", "oak"], ["a", "b"])


def test_metadata_that_names_no_pictures_is_told(tmp_path: Path) -> None:
    put(tmp_path / "trees", "1.png")
    (tmp_path / "trees" / "metadata.csv").write_text("picture,label\n1.png,a\n")
    with pytest.raises(ValueError, match=r"metadata\.csv must have a column file_name, got 'picture', 'label'"):
        table(tmp_path / "trees")
