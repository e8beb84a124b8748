"""The HTTP service on Ray Serve will live here.

It is not there yet: this package holds no code, and the command line does not offer `serve`.
"""
