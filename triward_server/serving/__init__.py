"""What starts, watches and changes tritonserver."""
