"""Text on disk. Code here may touch file formats; it imports nothing of this project but `config`."""
