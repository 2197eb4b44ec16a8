"""Turns members and labels into shards, and shards into parts; writes nothing."""
