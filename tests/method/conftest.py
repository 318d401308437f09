"""Check shapes and types of fleetfit.method at run time, wherever it is first imported from here on."""

import jaxtyping

jaxtyping.install_import_hook("fleetfit.method", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
