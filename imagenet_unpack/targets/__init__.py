"""The only code that touches a target's state: paths, locks, durable writes, records, journal, manifest."""
