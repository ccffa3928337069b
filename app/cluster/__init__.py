"""The service on Ray Serve: edges, encoder replicas and caption shards in processes of their own, on many machines.

An edge is the same application as a single process. Only two of its steps lead elsewhere: what the towers encode, and
what caption databases are searched for. Nothing here is imported unless the engine is ray.
"""

import os

# Read when Ray is imported and by the processes that it starts: no reports to its makers, and errors as problems.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "app.cluster.proxy:middlewares")
# What is slow is in threads anyway, so that another thread for the loop of ours only costs: a sixth of the throughput.
os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
os.environ.setdefault("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1000")
