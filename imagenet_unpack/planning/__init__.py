"""Members and labels to shards, and shards to parts; writes nothing."""
