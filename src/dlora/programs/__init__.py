"""What a person starts; only here do the two axes meet."""
