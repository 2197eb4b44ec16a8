"""Resources of the host and its cgroups; pools of worker processes; the per-host status file."""
