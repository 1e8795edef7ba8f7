"""What a run survives and tells: flags, checkpoints, resume, signals, log. Nothing here decides a
number."""
