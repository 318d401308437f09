"""What a device can ship: headers, temperatures and priors, each combination a way."""

from typing import get_args

from fleetfit.config.sections import RefineConfig
from fleetfit.core.records import HeaderKept, Way

TEMPERATURES = (1.0, 0.5, 0.7, 1.4)
CONCENTRATIONS = (0.3, 1.0, 3.0)  # samples that each class of a device is worth before any was seen
PRESENT_SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08)  # of the classes, that a device may have
SHIFT_CONCENTRATIONS = (1.0, 0.4, 0.1)
PRIOR_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)  # below 1, a class not seen on a device would be out of its reach


def ways_to_ship(refine: RefineConfig, num_classes: int, private: bool = False) -> tuple[Way, ...]:
    """All that a group chooses from; ``coarse`` as it is comes first.

    Where neurons are dropped, a header between the two is no pruned one, so there is none. With ``[privacy]`` the noise
    grows with the number of ways, so there are few.

    Args:
        refine: Says which headers there are, and whether there is a prior.
        num_classes: The priors' numbers of classes depend on it.
        private: With ``[privacy]``.
    """
    headers: list[HeaderKept] = ["coarse", "refined"]
    if refine.guard and not private and refine.exchange == "weights":
        between = () if refine.prune_share else ("quarter", "half")
        headers = [h for h in get_args(HeaderKept) if h in (*headers, *between, "own", "local")]
    priors: list[dict[str, float]] = [{}]
    if refine.class_prior and (private or refine.prior_estimate == "dirichlet"):
        priors += [{"prior_strength": k} for k in PRIOR_STRENGTHS]
    elif refine.class_prior:
        present = sorted({max(1, round(share * num_classes)) for share in PRESENT_SHARES}, reverse=True)
        priors += [{"prior_strength": a * k, "prior_classes": float(k)} for k in present for a in CONCENTRATIONS]
    looking: list[dict[str, float]] = []  # inputs say most where labels say little, so few priors are enough for them
    if refine.unlabelled and not private:
        fewer = priors[1:] if refine.prior_estimate == "dirichlet" else priors[2::6]
        looking = [{**prior, "shift_concentration": a} for prior in fewer for a in SHIFT_CONCENTRATIONS]
    temperatures = TEMPERATURES if refine.class_prior and not private else TEMPERATURES[:1]
    return tuple(
        Way(header=header, temperature=temperature, **prior)
        for header in headers
        for temperature in temperatures
        for prior in (*priors, *looking)
    )


def kind_of(way: Way) -> str:
    """A way without its numbers, for the summary and the report."""
    return way.header + (" + inputs" if way.shift_concentration else " + prior" if way.prior_strength else "")
