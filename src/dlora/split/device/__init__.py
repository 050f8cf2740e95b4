"""The half that has data, labels, factors and optimiser."""
