"""Real wires, and the one that stays in memory."""
