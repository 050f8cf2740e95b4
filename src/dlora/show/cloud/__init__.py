"""A cloud, for people and for Prometheus."""
