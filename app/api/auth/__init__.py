"""API keys, what each may do, and quotas."""
