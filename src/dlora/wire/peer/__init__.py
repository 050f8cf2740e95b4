"""What two peers say to each other."""
