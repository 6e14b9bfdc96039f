"""What Addenda is compared with: the dense mask, rivals that move the backbone, and methods for streams."""
