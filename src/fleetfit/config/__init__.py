"""The job: sections, defaults, presets, profiles, errors."""
