"""What runs inside Triton's processes."""
