"""Links between participants: over gRPC, or within one process."""
