"""The service on Ray Serve: edges, encoder replicas and caption shards in processes of their own, on many machines.

An edge is the same application as a single process. Only two of its steps lead elsewhere: what the towers encode, and
what caption databases are searched for. Nothing here is imported unless the engine is ray.
"""
