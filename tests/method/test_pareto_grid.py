"""Eqs. 10-13, against the printed formulas, moocore and brute force over sets."""

import moocore
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetfit.method.pareto_grid import choose, make_grid, pareto_front_grid


@st.composite
def objectives(draw, max_value=8):
    """Candidates with many ties; objectives may be constant."""
    num_objectives = draw(st.integers(1, 3))
    row = st.lists(st.integers(0, max_value), min_size=num_objectives, max_size=num_objectives)
    return np.array(draw(st.lists(row, min_size=1, max_size=14)), dtype=np.float64)


# -- Eq. 11 -----------------------------------------------------------------------------------------------------------


def test_grid_by_hand():
    # K = ceil(0.9 / 0.3) = 3 cells; energies 0, 100, 200, 300 fall in cells of 100.
    values = np.array([[1.0, 300.0], [1.25, 210.0], [1.45, 150.0], [1.9, 0.0]])
    grid = make_grid(values, gamma_p=0.31)
    assert grid.num_cells == 3
    assert grid.ideal.tolist() == [1.0, 0.0]
    assert grid.worst.tolist() == [1.9, 300.0]
    assert grid.cell_size == pytest.approx([0.3, 100.0])
    assert grid.coordinates.tolist() == [[1, 3], [1, 3], [2, 2], [3, 1]]


@pytest.mark.parametrize(("gamma_p", "num_cells"), [(10.0, 1), (1.0, 1), (0.5, 2), (0.4, 3), (0.01, 100)])
def test_number_of_cells(gamma_p, num_cells):
    assert make_grid(np.array([[0.0], [1.0]]), gamma_p).num_cells == num_cells


@settings(max_examples=200)
@given(objectives(), st.floats(0.01, 20), st.integers(-30, 30))
def test_coordinates_are_1_to_k_with_the_ideal_at_1_and_the_worst_at_k(values, gamma_p, exponent):
    # Powers of two scale without rounding: no unit may change the grid.
    values[:, 1:] *= 2.0**exponent
    grid = make_grid(values, gamma_p)
    assert grid.coordinates.min() >= 1
    assert grid.coordinates.max() <= grid.num_cells
    for objective in range(values.shape[1]):
        column, coordinate = values[:, objective], grid.coordinates[:, objective]
        assert (coordinate[column == column.min()] == 1).all()
        if column.max() > column.min():
            assert (coordinate[column == column.max()] == grid.num_cells).all()
        assert (np.diff(coordinate[column.argsort()]) >= 0).all()
        # What shares a cell differs by no more than the cell.
        for cell in set(coordinate.tolist()):
            assert np.ptp(column[coordinate == cell]) <= grid.cell_size[objective] * (1 + 1e-6)
    assert grid.cell_size[0] <= gamma_p * (1 + 1e-6)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10, unique=True), st.floats(0.05, 2))
def test_is_eq_11_as_printed_away_from_the_borders_of_cells(losses, gamma_p):
    f = np.array(losses)
    span, sigma = f.max() - f.min(), 1e-9
    if span < 1e-3:
        return
    k = max(1, int(np.ceil(span / gamma_p)))
    exact = (f - f.min() + sigma * span) / ((span + 2 * sigma * span) / k)
    clear = np.abs(exact - exact.round()) > 1e-6
    assert (make_grid(f[:, None], gamma_p).coordinates[clear, 0] == np.ceil(exact[clear])).all()


def test_units_of_joules_and_bytes_do_not_matter():
    # An absolute sigma of 1e-9 would be lost in 1e18 bytes and would swallow 1e-9 joules.
    loss = np.array([0.1, 0.2, 0.3, 0.4])
    column = np.array([4.0, 3.0, 1.0, 0.0])
    expected = make_grid(np.stack([loss, column], 1), 0.1).coordinates
    for scale in (1e-12, 1e-9, 1e9, 1e18):
        assert (make_grid(np.stack([loss, column * scale], 1), 0.1).coordinates == expected).all()


def test_degenerate_grids():
    one = make_grid(np.array([[0.5, 3.0, 2.0]]), 0.1)
    assert (one.num_cells, one.coordinates.tolist()) == (1, [[1, 1, 1]])
    same = make_grid(np.array([[0.5, 3.0], [0.9, 3.0]]), 0.1)
    assert same.coordinates[:, 1].tolist() == [1, 1]
    assert same.cell_size[1] == 0
    thin = make_grid(np.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]), 1e-8, sigma=1e-6)  # cells thinner than sigma
    assert thin.coordinates.min() >= 1
    assert thin.coordinates.max() <= thin.num_cells


def test_grid_refuses_bad_arguments():
    good = np.array([[1.0, 2.0]])
    with pytest.raises(ValueError, match="gamma_p must be > 0, got 0"):
        make_grid(good, 0.0)
    with pytest.raises(ValueError, match=r"sigma must be in 0..1"):
        make_grid(good, 0.1, sigma=0.0)
    with pytest.raises(ValueError, match="at least 1 candidate"):
        make_grid(np.zeros((0, 3)), 0.1)
    with pytest.raises(ValueError, match="must be finite"):
        make_grid(np.array([[np.nan, 2.0]]), 0.1)


# -- Eq. 12 -----------------------------------------------------------------------------------------------------------


def test_front_by_hand():
    # (2, 2) is on a line of its own in objective 0 and below nobody in objective 1, yet (1, 1) dominates it.
    coordinates = np.array([[1, 1], [2, 2], [1, 3], [3, 1]])
    assert pareto_front_grid(coordinates, drop_dominated=False).tolist() == [True, True, True, True]
    assert pareto_front_grid(coordinates).tolist() == [True, False, False, False]
    line = np.array([[1, 2], [1, 3], [2, 3]])
    # (2, 3) is best of its line Psi_0 = 2; (1, 3) is best of Psi_1 = 3.
    assert pareto_front_grid(line, drop_dominated=False).tolist() == [True, True, True]
    assert pareto_front_grid(np.array([[1, 1], [2, 1], [2, 2], [1, 2]]), drop_dominated=False).tolist() == [
        True,
        True,
        False,
        True,
    ]


def front_by_definition(cells):
    """Eq. 12 as repaired, written with sets: every l, every k."""
    front = set()
    for objective in range(len(cells[0])):

        def others(cell, objective=objective):
            return cell[:objective] + cell[objective + 1 :]

        for k in {others(cell) for cell in cells}:
            line = [i for i, cell in enumerate(cells) if others(cell) == k]
            best = min(cells[i][objective] for i in line)
            front |= {i for i in line if cells[i][objective] == best}
    return front


@settings(max_examples=300)
@given(objectives(max_value=4))
def test_front_against_the_definition_and_moocore(values):
    coordinates = values.astype(np.int64) + 1
    front = pareto_front_grid(coordinates, drop_dominated=False)
    assert set(np.flatnonzero(front)) == front_by_definition([tuple(row) for row in coordinates.tolist()])
    non_dominated = moocore.is_nondominated(coordinates.astype(float), keep_weakly=True)
    assert (pareto_front_grid(coordinates) == non_dominated).all()
    assert (front | ~non_dominated).all(), "Eq. 12 holds every non-dominated cell"


@settings(max_examples=200)
@given(objectives(max_value=40), st.floats(0.5, 20))
def test_every_cell_of_the_front_holds_a_pareto_optimal_candidate(values, gamma_p):
    coordinates = make_grid(values, gamma_p).coordinates
    optimal = moocore.is_nondominated(values, keep_weakly=True)
    for cell in coordinates[pareto_front_grid(coordinates)]:
        assert optimal[(coordinates == cell).all(axis=1)].any()


# -- Eq. 13 -----------------------------------------------------------------------------------------------------------


def test_choice_by_hand_differs_between_distances():
    # Both in the best interval: offsets (0, 3, 0) and (0, 2, 2): L1 3 < 4, Euclidean 9 > 8.
    coordinates = np.array([[1, 4, 1], [1, 3, 3], [2, 1, 1]])
    values = np.array([[0.10, 4.0, 1.0], [0.11, 3.0, 3.0], [0.30, 1.0, 1.0]])
    everyone = np.ones(3, dtype=bool)
    assert choose(values, coordinates, everyone, "l1") == 0
    assert choose(values, coordinates, everyone, "euclidean") == 1
    assert choose(values, coordinates, everyone) == 1
    # The third is nearest to the ideal of all, but worse by more than gamma_p; alone on the front it is chosen.
    assert choose(values, coordinates, np.array([False, False, True])) == 2


def test_ties_go_to_the_lower_loss_then_to_the_first():
    coordinates = np.array([[1, 2, 1], [1, 1, 2], [1, 2, 1], [1, 1, 2]])
    values = np.array([[0.3, 2.0, 1.0], [0.2, 1.0, 2.0], [0.2, 2.0, 1.0], [0.4, 1.0, 2.0]])
    assert choose(values, coordinates, np.ones(4, dtype=bool)) == 1


@settings(max_examples=300)
@given(objectives(max_value=30), st.floats(0.5, 20), st.sampled_from(["euclidean", "l1"]))
def test_choice_by_brute_force(values, gamma_p, distance):
    coordinates = make_grid(values, gamma_p).coordinates
    on_front = pareto_front_grid(coordinates)
    chosen = choose(values, coordinates, on_front, distance)
    assert on_front[chosen]
    front = [i for i in range(len(values)) if on_front[i]]
    best = min(values[i, 0] for i in front)
    order = {"euclidean": 2, "l1": 1}[distance]
    span = np.ptp(values[:, 0])
    assert values[chosen, 0] - best <= gamma_p * (1 + 1e-6) or span == 0
    cell = next(coordinates[i, 0] for i in front if values[i, 0] == best)
    rivals = [i for i in front if coordinates[i, 0] == cell]
    far = {i: np.linalg.norm(coordinates[i] - 1, order) for i in rivals}
    nearest = [i for i in rivals if far[i] <= min(far.values()) + 1e-9]
    assert chosen == min(nearest, key=lambda i: (values[i, 0], i))


def test_a_larger_gamma_buys_a_smaller_model():
    size = np.arange(1.0, 11.0)
    values = np.stack([1 / size, size, size], axis=1)
    chosen = []
    for gamma_p in (0.001, 0.1, 0.3):
        coordinates = make_grid(values, gamma_p).coordinates
        chosen.append(size[choose(values, coordinates, pareto_front_grid(coordinates))])
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 10
    assert chosen[-1] <= 4


def test_a_single_cell_is_a_tie_that_the_lowest_loss_wins():
    values = np.array([[0.30, 1.0], [0.28, 9.0], [0.29, 2.0]])
    grid = make_grid(values, gamma_p=0.1)
    assert grid.num_cells == 1
    assert choose(values, grid.coordinates, pareto_front_grid(grid.coordinates)) == 1


def test_choice_refuses_an_empty_front():
    with pytest.raises(ValueError, match="at least 1 candidate, got 0"):
        choose(np.ones((1, 2)), np.ones((1, 2), dtype=np.int64), np.zeros(1, dtype=bool))


def test_ties_in_one_cell_go_to_the_cheaper_candidate_or_to_the_lower_loss() -> None:
    objectives = np.array([[0.30, 9.0, 9.0], [0.31, 1.0, 2.0], [0.32, 2.0, 1.0]])
    grid = make_grid(objectives, gamma_p=1.0)
    assert grid.num_cells == 1
    on_front = pareto_front_grid(grid.coordinates)
    assert choose(objectives, grid.coordinates, on_front, ties="loss") == 0
    assert choose(objectives, grid.coordinates, on_front, ties="cheaper") == 1
