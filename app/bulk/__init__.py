"""Bulk classification: classifies the images of folders, tar files and Parquet files, and writes Parquet.

``sources`` plans the work units, ``readers`` reads them, ``batches`` groups their images, ``classifier`` classifies
them, and ``parts`` writes the rows. ``run`` joins these in one process; ``ray_engine`` distributes the units over
processes on Ray. Both can resume an interrupted run.
"""
