"""The training program: from a folder of images to a checkpoint that the service serves unchanged."""
