"""The half that has the data, labels, factors and optimiser."""
