"""What a run survives and what it tells: checkpoints, resume, log, guards. Code here decides no number."""
