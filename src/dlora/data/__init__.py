"""The examples of a run: rows are read, formatted, labelled, divided among peers and batched."""
