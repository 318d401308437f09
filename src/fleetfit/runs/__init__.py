"""A run as files: its folder, summary, models, exports, predictions, report."""
