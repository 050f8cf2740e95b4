"""Links between programs: over gRPC, or within one process."""
