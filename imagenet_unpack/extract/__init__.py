"""One shard: read its members, write its files, within the limits; `run_shard` is the only callable that travels."""
