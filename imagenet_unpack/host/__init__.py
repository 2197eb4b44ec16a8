"""What the host, its cgroups and quotas leave to this job; pools of worker processes; the per-host status file."""
