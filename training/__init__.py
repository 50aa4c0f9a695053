"""How the small SDXL in `buildtool/data/tiny` was made: its world, its training, its judge.

Nothing here is needed to build or run an artifact; wheels leave this package out.
"""
