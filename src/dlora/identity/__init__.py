"""Who is who without a centre: keys, certificates, the federation file."""
