"""Links: real wires, and those that stay in memory."""
