"""Tables of the benchmark on leakage: the page of results in Markdown."""

from collections.abc import Mapping

from digits_tables import spread, table
from scipy.stats import norm

from fleetfit.config.sections import PrivacyConfig
from fleetfit.method.noise import epsilon_of

DELTA = PrivacyConfig().delta


def markdown(
    rows: list[dict[str, float]],
    quantiles: Mapping[float, list[dict[str, float]]],
    cost: Mapping[str, Mapping[str, list[dict[str, float]]]],
    promises: Mapping[str, float | None],
    command: str,
    seconds: float,
) -> str:
    """The page.

    Args:
        rows: Attacks on ``samples``, by seed.
        quantiles: Attacks on ``sliced``, by noise multiplier and seed.
        cost: Refined fleets, by way, setting and seed.
        promises: Epsilon of each way's whole run.
        command: What made this.
        seconds: How long it took on one core.
    """
    settings = list(next(iter(cost.values())))

    def share(found: list[dict[str, float]], name: str) -> str:
        return spread([f[name] for f in found]) if name in found[0] else "–"

    def number(found: list[dict[str, float]], name: str, digits: int = 2) -> str:
        return spread([f[name] for f in found], 1, digits) if name in found[0] else "–"

    sketches = [
        ["`samples`", "–", "–", share(rows, "exact"), "100", number(rows, "presence"), share(rows, "mix_distance")],
        *(
            [
                "`sliced`" if z == 0 else f"`sliced`, z = {z:g}",
                f"{epsilon_of(z, 1, DELTA):,.3g}" if z else "–",
                f"{norm.cdf(1 / z / 2**0.5):.2f}" if z else "1",
                number(found, "membership"),
                number(found, "strongest") if z else "1",
                number(found, "presence"),
                share(found, "mix_distance"),
            ]
            for z, found in quantiles.items()
        ),
    ]
    sketches[0][3:5] = ["1.00 (found again: " + share(rows, "exact") + " %)", "1"]
    costs = []
    for way, by_setting in cost.items():
        epsilon = promises[way]
        costs.append([way, "–" if epsilon is None else f"{epsilon:,.3g}"])
        for found in by_setting.values():
            costs[-1] += [share(found, "accuracy"), number(found, "presence")]
    bases = [
        [name, *(share(next(iter(cost.values()))[setting], kind) for setting in settings)]
        for name, kind in (("coarse: the model as it was sent", "coarse"), ("local: fine-tuned alone", "local"))
    ]
    return "\n".join(
        [
            "# What a sketch reveals, and what privacy costs",
            "",
            f"`{command}`; digits; mean ± standard error over seeds; "
            f"{seconds / 60:.0f} minutes on a core, without what was kept of before. What the words mean for a fleet: "
            "docs/security.md.",
            "",
            "The attacker is the edge. It knows the backbone (the reference, 64 channels), the job with its seed, and "
            "the cloud's public images with labels. It sees what fifteen devices send; each has five of the ten digits "
            "and about 28 training images. A sketch is of all training images, or with `samples` of 24 of them.",
            "",
            "## `samples`: rows of features",
            "",
            *table(
                ["what the attacker wants", "it gets", "knowing the label", "knowing nothing"],
                [
                    ["the label, % right", share(rows, "labels"), "100", "10"],
                    [
                        "the image, root mean square error of pixels 0..16",
                        number(rows, "rmse"),
                        f"{number(rows, 'rmse_class')} (mean image of the label that it reads)",
                        f"{number(rows, 'rmse_mean')} (mean image)",
                    ],
                    [
                        "whose picture it is: the very image among all devices' training images, by its own "
                        "reconstruction, %",
                        share(rows, "identified"),
                        share(rows, "identified_class"),
                        share(rows, "identified_chance"),
                    ],
                    ["the same with the candidates' features, % found again", share(rows, "exact"), "", ""],
                ],
            ),
            "## Sketches compared",
            "",
            "`member`: area under the ROC curve (0.5 = a coin) of telling a device's training images from its other "
            "images, by how near their projections are to the quantiles. `one of two`: the same for an attacker who "
            "knows all of a device's training images but one, and both images that this one may be. `bound`: the most "
            "that any attacker can reach when it has to tell any two data sets apart; that is what epsilon is about. "
            "`class present`: area under the curve of telling which classes a device has. `mix`: distance (total "
            "variation, %) of the guessed class mix to the true one; knowing nothing, it is "
            f"{share(rows, 'mix_distance_uniform')}. z is `privacy.noise_multiplier`, epsilon (delta {DELTA:g}) that "
            "of the sketch alone.",
            "",
            *table(["sketch", "epsilon", "bound", "member", "one of two", "class present", "mix"], sketches),
            "## What privacy costs, and what headers tell",
            "",
            "Mean accuracy % of fifteen devices, as the devices know it themselves; epsilon of the whole run. `class "
            "present`: as above, from by how much the first header that a device sends raises each class. In the iid "
            "setting nearly all devices have all classes.",
            "",
            *table(["nothing shared", *settings], bases),
            *table(
                ["way", "epsilon", *(x for s in settings for x in (f"{s}: accuracy", "class present"))],
                costs,
            ),
        ]
    )
