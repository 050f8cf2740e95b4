"""One run: prepared, trained, scored, saved, resumed."""
