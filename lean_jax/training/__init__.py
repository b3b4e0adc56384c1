"""One loop, its checkpoints and its meshes."""
