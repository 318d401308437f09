"""Real machines: kits, certificates, and the programs that each participant starts."""
