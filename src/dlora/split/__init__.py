"""Where the frozen model runs (DLoRA)."""
