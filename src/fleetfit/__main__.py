"""``python -m fleetfit`` is ``fleetfit``."""

from fleetfit.cli import main

if __name__ == "__main__":
    main()
