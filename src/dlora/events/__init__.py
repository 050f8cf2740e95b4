"""What happened: the log, and what follows from it."""
