"""A stand-in for nexfort: only its presence is looked at."""
