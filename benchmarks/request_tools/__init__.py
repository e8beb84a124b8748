"""The processes of `benchmarks.requests`, one kind of tool each."""
