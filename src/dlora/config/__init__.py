"""What the user decides, and how it is read."""
