"""Code that starts, watches and changes tritonserver."""
