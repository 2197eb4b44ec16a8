"""One run from plan to published: executors, the loop over shards, stopping, tune."""
