"""What is trained: the factors, how they stack on one frozen model, how they go to disk."""
