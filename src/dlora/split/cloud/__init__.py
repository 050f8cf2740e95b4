"""The half that runs the frozen model, for many devices."""
