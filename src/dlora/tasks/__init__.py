"""What is computed in another way for each task: losses, scores, texts that a model writes."""
