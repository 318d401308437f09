"""fleetfit."""
