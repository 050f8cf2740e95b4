"""What a person starts: the doors."""
