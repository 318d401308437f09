"""An edge server: its header search, its devices' rounds, and what they ship."""
