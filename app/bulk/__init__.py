"""Images in great numbers: read in a fixed order, answered as the service answers, written in parts.

``sources`` plans, ``reading`` reads, ``output`` writes, ``answering`` does the work between them in one process, and
``ray_engine`` spreads it over many. A run that ends early goes on where it was, in either way.
"""
