"""Jobs that come with fleetfit, each a TOML file beside this one, known by its name: ``fleetfit run digits``."""

import difflib
from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> tuple[str, ...]:
    """All of them; those that begin with fleet- are for ``fleetfit provision``."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def job_path(named: str | Path) -> Path:
    """The file that a command's JOB means: one that is there, or else the recipe of that name.

    Raises:
        ValueError: it is no path, and there is no such recipe; names the nearest one, and all.
    """
    path = Path(named)
    recipe = FOLDER / f"{path.stem}.toml"
    if path.is_file():
        return path
    if path.name != str(named) or path.suffix:
        if recipe.is_file() and not path.exists():
            raise ValueError(f"{named}: No such file; the recipe of that name is called {path.stem}")
        return path
    if recipe.is_file():
        return recipe
    if path.exists():
        return path
    near = difflib.get_close_matches(path.stem, recipe_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(f"{named}: No such file, and no recipe of that name{hint} Recipes: {', '.join(recipe_names())}")


def headline(name: str) -> str:
    """What a recipe says of itself in its first line."""
    with (FOLDER / f"{name}.toml").open(encoding="utf-8") as lines:
        return next(lines).lstrip("# ").rstrip()


def noted(name: str, word: str) -> str:
    """What its head says behind a word, as hardware or time; lines that go on are joined."""
    text: list[str] = []
    for line in (FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        said = line[1:]
        if said.startswith(f" {word} "):
            text = [said.removeprefix(f" {word} ").strip()]
        elif text and said.startswith("    "):
            text.append(said.strip())
        elif text:
            break
    return " ".join(text)
