"""The commands of `dlora`: each parses its arguments, calls one function and prints."""
