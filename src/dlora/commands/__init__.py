"""What stands behind dlora on the command line: parse, call one function, print."""
