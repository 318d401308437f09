"""Many devices on one machine, by Flower's simulation."""
