"""Code that runs inside Triton's processes."""
