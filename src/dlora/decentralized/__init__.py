"""How participants agree (Dec-LoRA)."""
