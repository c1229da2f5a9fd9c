"""The main job end to end on a small model that is made on the spot, with no network."""
