"""Check shapes and types of fleetfit.method at run time, wherever it is first imported from here on."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
from hypothesis import settings

jaxtyping.install_import_hook("fleetfit.method", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# The first call of anything is slow on a busy machine; the same examples every time.
settings.register_profile("fleetfit", deadline=None, derandomize=True)
settings.load_profile("fleetfit")
