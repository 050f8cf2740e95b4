"""What cloud and device say to each other."""
