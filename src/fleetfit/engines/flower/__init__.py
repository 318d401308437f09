"""The tiers over Flower: links that carry our messages as Flower's, and the engines that are made of them.

Importing this imports neither Flower nor Ray, and keeps both from telling anyone about the run.
"""

import os

for _name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ.setdefault(_name, "0")  # read when Flower and Ray are imported
