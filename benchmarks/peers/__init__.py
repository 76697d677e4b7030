"""Other servers of the same models, measured beside this one."""
