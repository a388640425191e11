"""How the two halves of a checkpoint, sharded and common, meet the disk."""
