"""What is sent over a network: frames and tensors, written as bytes."""
