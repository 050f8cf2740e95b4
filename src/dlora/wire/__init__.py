"""What travels: frames and tensors as bytes."""
