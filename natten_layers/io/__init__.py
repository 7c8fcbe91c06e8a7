"""Files in and out. Nothing here knows a model: what is to be built or filled is handed in by its caller."""
