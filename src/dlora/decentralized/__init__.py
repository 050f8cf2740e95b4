"""With whom a participant agrees (Dec-LoRA)."""
