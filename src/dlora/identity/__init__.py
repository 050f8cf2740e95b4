"""Keys, certificates and the federation file: how members know each other without a centre."""
