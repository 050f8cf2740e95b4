"""The frames that two peers send to each other."""
