"""Whose rows: read, formatted, labelled, divided, batched."""
