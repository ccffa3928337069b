"""The service on Ray Serve: edges, encoder replicas and caption shards are separate processes, on one or more machines.

An edge is the application of a single process, except for two steps: encoder replicas encode, and shard replicas search
the captions. This package is imported only with the engine ``ray``.
"""

import os

# Ray and the processes that it starts read these variables: no usage statistics, and errors as problem details.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "app.cluster.proxy:middlewares")
# Slow work already runs in threads; a separate thread for the event loop costs a sixth of the throughput.
os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
os.environ.setdefault("RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE", "1000")
