"""One peer among others that may be late, gone, broken or lying."""
