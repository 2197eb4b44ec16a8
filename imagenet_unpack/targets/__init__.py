"""What is in a target and its state: paths, locks, durable writes, records, journal, manifest, split states."""
