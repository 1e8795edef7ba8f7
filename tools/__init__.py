"""Parts of the programs that are not training, and small programs: `python -m tools.plot`. train.py imports nothing
from here."""
