"""What everything stands on: records, encoding, checkpoints, files, hardware, randomness."""
