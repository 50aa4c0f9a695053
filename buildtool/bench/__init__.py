"""``sdxl-bench``: artifacts and options side by side, by time, memory and picture."""
