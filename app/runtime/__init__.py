"""The process and its machine: cores, data files, atomic writes."""
