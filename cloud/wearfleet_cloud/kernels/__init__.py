"""Hot inner computations: in each folder a slow obvious reference and faster forms of the same function."""
