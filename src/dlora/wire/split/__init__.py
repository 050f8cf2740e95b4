"""The frames that cloud and device send to each other."""
