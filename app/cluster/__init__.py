"""The service on Ray Serve: edges, encoder replicas and caption shards in processes of their own, on many machines.

An edge is the same application as a single process. Only two of its steps lead elsewhere: what the towers encode, and
what caption databases are searched for. Nothing here is imported unless the engine is ray.
"""

import os

# Read when Ray is imported and by the processes that it starts: no reports to its makers, and errors as problems.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "app.cluster.proxy:middlewares")
