"""fairseq's spellings and files, read without running fairseq. Only the command line and the loading of checkpoints
import this."""
