"""What the engines cost beside one another and beside Flower alone: benchmarks/results/engines_*.md.

    python benchmarks/engines.py parity                         local, simulation, deployment: the same models?
    python benchmarks/engines.py rounds                         a round of refinement beside Flower's own floor
    python benchmarks/engines.py mistakes                       how soon a mistake is told, on both sides
    python benchmarks/engines.py simulation                     100, 200, 500 and 1,000 devices in 20 clusters
    python benchmarks/engines.py simulation --devices 20 40     fewer, to see that it works

All but the last start the fleet of recipes/fleet-loopback.toml on this machine, each program of it, over TLS with keys.
"""

import argparse
import signal
import sys
from pathlib import Path

from engines_mistakes import mistakes
from engines_parity import parity
from engines_rounds import rounds
from engines_simulation import simulation

RESULTS = Path(__file__).parent / "results"
PARTS = {"parity": parity, "rounds": rounds, "mistakes": mistakes, "simulation": simulation}


def main() -> None:
    """The part that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--devices", type=int, nargs="+", default=[100, 200, 500, 1000], help="of simulation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of parity")
    parser.add_argument("--rounds", type=int, default=13, help="of rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pages")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was started is ended
    options.out.mkdir(parents=True, exist_ok=True)
    PARTS[options.part](options)


if __name__ == "__main__":
    main()
