"""The tiers over Flower: links that carry our messages as Flower's, and the engines that are made of them.

Importing this imports neither Flower nor Ray, and keeps both from telling anyone about the run.

Raises:
    ImportError: they are not installed.
"""

import os
from importlib.util import find_spec

for _name in ("flwr", "ray"):
    if find_spec(_name) is None:
        raise ImportError(f'the engines over Flower need the package {_name!r}: pip install "fleetfit[flower]"')

# Read when Flower and Ray are imported. The last: a device that asks for no GPU is told so by us, not by Ray.
for _name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
    os.environ.setdefault(_name, "0")
